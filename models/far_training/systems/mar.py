"""Training of MAR: tokens in random order, of which the masked ones are denoised given the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far_models.blocks import take_tokens
from far_models.checkpoint.save import export_checkpoint, metadata_of
from far_models.far import FARConfig, restore_indices
from far_models.mar import MAR
from far_training.data.latents import LatentSet
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Report, Task
from far_training.systems.batches import (
    check_classes,
    check_latents,
    diffusion_draws,
    labels_or_null,
    latent_batch,
    official_names,
    run_args,
    tokens_of,
)
from far_training.systems.losses import DiffusionLoss, token_losses
from far_training.systems.masks import random_count, split_indices
from far_training.systems.settings import MARLossSettings


class MARLosses(nn.Module):
    """MAR's losses of a batch, as `mar_task` fetches it; only the masked tokens count."""

    def __init__(self, model: MAR, settings: MARLossSettings) -> None:
        super().__init__()
        self.model = model
        self.diffusion = DiffusionLoss(model.config.prediction, settings.learned_variance)

    def forward(
        self,
        latents: Tensor,
        noisy: Tensor,
        labels: Tensor,
        visible: Tensor,
        masked: Tensor,
        t: Tensor,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """The loss [] and its terms, of scaled latents [B, C, g, g].

        noisy: the latents that the network sees [B, C, g, g].
        labels: classes [B].
        visible, masked: indices [B, V] and [B, L - V] of the tokens.
        t, noise: of the masked tokens, as in `token_losses`.
        """
        restore = restore_indices(visible, self.model.config.tokens)
        z = self.model.features(tokens_of(noisy), self.model.class_embedding(labels), visible, restore)
        head = self.model.diffloss.net
        condition = head.condition(take_tokens(z, masked))
        target = take_tokens(tokens_of(latents), masked)
        error, bound = token_losses(self.diffusion, head, target, condition, t, noise)
        return {"loss": (error + bound).mean(), "error": error.mean(), "bound": bound.mean()}


def mar_task(
    config: FARConfig,
    settings: MARLossSettings,
    data: LatentSet,
    batch: int,
    seed: int,
    report: Report,
    sampling: Mapping[str, Any] | None = None,
) -> Task:
    """Training of a MAR on latents; the parameters are those of `far_task`."""
    check_latents(data, config.channels, config.grid)
    check_classes(data.source, data.names, config.classes)
    torch.manual_seed(seed)
    model = MAR(config, settings.dropout)
    model.initialize()

    def fetch(rng: SampleRng, progress: float) -> tuple[Tensor, ...]:
        samples = latent_batch(data, settings, config.latent_scale, batch, rng, progress)
        labels = labels_or_null(data.labels[samples.rows], config.classes, settings.label_drop, rng)
        masked = random_count(settings.mask_least, config.tokens, rng.shared)
        indices = split_indices(rng.uniform(config.tokens), config.tokens - masked)
        draws = diffusion_draws(masked, config.channels, settings.draws, rng)
        return samples.latents, samples.noisy, labels, *indices, *draws

    def finish(average: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(average, folder / "mar.safetensors", data.names, summary, sampling=sampling)

    return Task(
        system="mar",
        model=model,
        losses=MARLosses(model, settings),
        fetch=fetch,
        epoch_length=len(data.train),
        args=run_args("mar", config, settings) | official_names(config),
        report=report,
        finish=finish,
        no_decay=("diffloss",),
        metadata=metadata_of(model, data.names, sampling),
    )
