"""Training of MAR: tokens of a random order, of which the masked ones are denoised given the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from far_training.loop.task import Task
from far_training.systems.batches import (
    check_classes,
    check_latents,
    diffusion_draws,
    disturbed_latents,
    drawn_latents,
    dropped_labels,
    official_names,
    rows_of,
    run_args,
    tokens_of,
)
from far_training.systems.losses import DiffusionLoss, token_losses
from far_training.systems.masks import random_count, split_indices


@dataclass(frozen=True)
class MARLossSettings:
    """How MAR is trained (arXiv 2406.11838 section 4).

    mask_least: the masked share is normal around 1 with deviation 0.25, cut to [mask_least, 1]. The others mean what
    they mean in FARLossSettings.
    """

    mask_least: float = 0.7
    label_drop: float = 0.1
    input_noise: float = 0.0
    draws: int = 4
    flip: float = 0.5
    flip_until: float = 1.0
    dropout: float = 0.1
    learned_variance: bool = True


class MARLosses(nn.Module):
    """Losses of scaled latents [B, C, g, g], the same as they are shown, labels [B], visible [B, V] and hidden indices
    [B, L - V], and timesteps and noise of the hidden tokens (`token_losses`), which alone count."""

    def __init__(self, model: MAR, settings: MARLossSettings) -> None:
        super().__init__()
        self.model = model
        self.diffusion = DiffusionLoss(model.config.prediction, settings.learned_variance)

    def forward(
        self,
        latents: Tensor,
        disturbed: Tensor,
        labels: Tensor,
        visible: Tensor,
        hidden: Tensor,
        t: Tensor,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        restore = restore_indices(visible, self.model.config.tokens)
        z = self.model.features(tokens_of(disturbed), self.model.class_embedding(labels), visible, restore)
        head = self.model.diffloss.net
        condition = head.condition(take_tokens(z, hidden))
        target = take_tokens(tokens_of(latents), hidden)
        error, bound = token_losses(self.diffusion, head, target, condition, t, noise)
        return {"loss": (error + bound).mean(), "error": error.mean(), "bound": bound.mean()}


def mar_task(
    config: FARConfig,
    settings: MARLossSettings,
    data: LatentSet,
    batch: int,
    seed: int,
    report: Callable[[nn.Module, int, Path], dict[str, float]],
    sampling: Mapping[str, Any] | None = None,
) -> Task:
    """Training of a MAR on latents; see `far_task`."""
    check_latents(data, config.channels, config.grid)
    check_classes(data.source, data.names, config.classes)
    torch.manual_seed(seed)
    model = MAR(config, settings.dropout)
    model.initialize()
    losses = MARLosses(model, settings)

    def fetch(chance: SampleRng, done: float) -> tuple[Tensor, ...]:
        rows = rows_of(data.train, batch, chance)
        flip = settings.flip if done < settings.flip_until else 0.0
        latents = drawn_latents(data, rows, config.latent_scale, flip, chance)
        disturbed = disturbed_latents(latents, settings.input_noise, chance)
        labels = dropped_labels(data.labels[rows], config.classes, settings.label_drop, chance)
        hidden = random_count(settings.mask_least, config.tokens, chance.of_step)
        sides = split_indices(chance.uniform(config.tokens), config.tokens - hidden)
        draws = diffusion_draws(hidden, config.channels, settings.draws, chance)
        return latents, disturbed, labels, *sides, *draws

    def finish(ema: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(ema, folder / "mar.safetensors", data.names, summary, sampling=sampling)

    return Task(
        "mar",
        model,
        losses,
        fetch,
        len(data.train),
        run_args("mar", config, settings) | official_names(config),
        report,
        finish,
        no_decay=("diffloss",),
        metadata=metadata_of(model, data.names, sampling),
    )
