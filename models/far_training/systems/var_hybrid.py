"""Training of the hybrids between VAR and FAR: next-scale prediction of continuous tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from far_models.var_hybrid import VARHybrid, VARHybridConfig
from far_training.data.latents import LatentSet
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Report, Task
from far_training.systems.batches import (
    check_classes,
    check_latents,
    diffusion_draws,
    labels_or_null,
    posterior_latents,
    run_args,
    sample_rows,
    tokens_of,
)
from far_training.systems.losses import DiffusionLoss, token_losses
from far_training.systems.settings import VARHybridLossSettings
from far_training.systems.var import NO_DECAY, per_scale

MEASURED_PICTURES = 512
"""Pictures on which the range of the maps is measured."""


class VARHybridLosses(nn.Module):
    """Diffusion loss, its mean over the tokens of all scales, and the squared error of every scale."""

    def __init__(self, model: VARHybrid, settings: VARHybridLossSettings) -> None:
        super().__init__()
        self.model = model
        self.diffusion = DiffusionLoss(model.config.prediction, settings.learned_variance)

    def forward(
        self, labels: Tensor, latents: Tensor, disturbance: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """The loss [] and its terms, of labels [B] and scaled latents [B, C, g, g].

        disturbance: noise of the inputs [B, L, C]; that of the first scale, which has no input, is not used.
        t, noise: of every token, as in `token_losses`.
        """
        model = self.model
        with torch.autocast(latents.device.type, enabled=False):  # the targets need all digits
            targets, inputs = model.targets_and_inputs(tokens_of(latents))
        inputs = inputs + disturbance[:, disturbance.shape[1] - inputs.shape[1] :]
        condition = model.condition(model.var.features(labels, inputs), model.scale_numbers())
        error, bound = token_losses(self.diffusion, model.head.net, targets, condition, t, noise)
        totals = {"loss": (error + bound).mean(), "error": error.mean(), "bound": bound.mean()}
        return totals | per_scale(model.var, "error", error)


def var_hybrid_task(
    config: VARHybridConfig, settings: VARHybridLossSettings, data: LatentSet, batch: int, seed: int, report: Report
) -> Task:
    """Training of a hybrid on latents; the parameters are those of `far_task`."""
    check_latents(data, config.channels, config.grid)
    check_classes(data.source, data.names, config.classes)
    torch.manual_seed(seed)
    model = VARHybrid(config)
    model.var.drop_path = settings.drop_path
    measured = data.train[:: -(-len(data.train) // MEASURED_PICTURES)]
    mean, _ = data.moments(measured, np.zeros(len(measured), np.bool_))
    model.set_gain(tokens_of(config.latent_scale * mean))
    tokens = sum(side * side for side in config.patch_nums)

    def fetch(rng: SampleRng, progress: float) -> tuple[Tensor, ...]:
        rows = sample_rows(data.train, batch, rng)
        latents = posterior_latents(data, rows, config.latent_scale, settings.flip_share(progress), rng)
        disturbance = settings.input_noise * rng.normal().abs().reshape(-1, 1, 1)
        disturbance = disturbance * rng.normal(tokens, config.channels)
        labels = labels_or_null(data.labels[rows], config.classes, settings.label_drop, rng)
        return labels, latents, disturbance, *diffusion_draws(tokens, config.channels, settings.draws, rng)

    def finish(average: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        """Nothing beside the training state: hybrids are compared, not exported."""

    return Task(
        system="var_hybrid",
        model=model,
        losses=VARHybridLosses(model, settings),
        fetch=fetch,
        epoch_length=len(data.train),
        args=run_args("var_hybrid", config, settings),
        report=report,
        finish=finish,
        no_decay=(*NO_DECAY, "head."),
    )
