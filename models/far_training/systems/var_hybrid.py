"""Training of the hybrids between VAR and FAR: next-scale prediction of continuous tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from far_models.var_hybrid import VARHybrid, VARHybridConfig
from far_training.data.latents import LatentSet
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Task
from far_training.systems.batches import (
    check_classes,
    check_latents,
    diffusion_draws,
    drawn_latents,
    dropped_labels,
    rows_of,
    run_args,
    tokens_of,
)
from far_training.systems.losses import DiffusionLoss, token_losses
from far_training.systems.var import NO_DECAY, per_scale

MEASURED = 512


@dataclass(frozen=True)
class VARHybridLossSettings:
    """How a hybrid is trained; as in FARLossSettings, and drop_path as in VARLossSettings."""

    label_drop: float = 0.1
    drop_path: float = 0.0
    input_noise: float = 0.0
    draws: int = 4
    flip: float = 0.0
    flip_until: float = 1.0
    learned_variance: bool = True


class VARHybridLosses(nn.Module):
    """Diffusion loss of labels [B] and scaled latents [B, C, g, g], the mean over the tokens of all scales, and the
    squared error of every scale. disturbance [B, L, C]: noise of the inputs, of which the first scale has none.
    timesteps and noise of every token: `token_losses`."""

    def __init__(self, model: VARHybrid, settings: VARHybridLossSettings) -> None:
        super().__init__()
        self.model = model
        self.diffusion = DiffusionLoss(model.config.prediction, settings.learned_variance)

    def forward(
        self, labels: Tensor, latents: Tensor, disturbance: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        model = self.model
        with torch.autocast(latents.device.type, enabled=False):  # the targets need all digits
            targets, inputs = model.maps(tokens_of(latents))
        inputs = inputs + disturbance[:, disturbance.shape[1] - inputs.shape[1] :]
        condition = model.condition(model.var.features(labels, inputs), model.scale_numbers())
        error, bound = token_losses(self.diffusion, model.head.net, targets, condition, t, noise)
        totals = {"loss": (error + bound).mean(), "error": error.mean(), "bound": bound.mean()}
        return totals | per_scale(model.var, "error", error)


def var_hybrid_task(
    config: VARHybridConfig,
    settings: VARHybridLossSettings,
    data: LatentSet,
    batch: int,
    seed: int,
    report: Callable[[nn.Module, int, Path], dict[str, float]],
) -> Task:
    """Training of a hybrid on latents; `config.latent_scale` is the data's."""
    check_latents(data, config.channels, config.grid)
    check_classes(data.source, data.names, config.classes)
    torch.manual_seed(seed)
    model = VARHybrid(config)
    model.var.drop_path = settings.drop_path
    known = data.train[:: -(-len(data.train) // MEASURED)]
    mean, _ = data.moments(known, np.zeros(len(known), np.bool_))
    model.measure(tokens_of(config.latent_scale * mean))
    losses = VARHybridLosses(model, settings)

    tokens = sum(side * side for side in config.patch_nums)

    def fetch(chance: SampleRng, done: float) -> tuple[Tensor, ...]:
        rows = rows_of(data.train, batch, chance)
        flip = settings.flip if done < settings.flip_until else 0.0
        latents = drawn_latents(data, rows, config.latent_scale, flip, chance)
        disturbance = settings.input_noise * chance.normal().abs().reshape(-1, 1, 1)
        disturbance = disturbance * chance.normal(tokens, config.channels)
        labels = dropped_labels(data.labels[rows], config.classes, settings.label_drop, chance)
        return labels, latents, disturbance, *diffusion_draws(tokens, config.channels, settings.draws, chance)

    def finish(ema: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        """Nothing beside the training state: hybrids are compared, not exported."""

    return Task(
        "var_hybrid",
        model,
        losses,
        fetch,
        len(data.train),
        run_args("var_hybrid", config, settings),
        report,
        finish,
        no_decay=(*NO_DECAY, "head."),
    )
