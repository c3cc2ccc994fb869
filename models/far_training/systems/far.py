"""Training of FAR: which level, which mask, which target, which loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far_models.checkpoint.save import export_checkpoint, metadata_of
from far_models.far import FAR, FARConfig, restore_indices
from far_models.head import DiffusionHead
from far_runtime.sampling.lowpass import lowpass_matrices
from far_training.data.latents import LatentSet
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Report, Task
from far_training.systems.batches import (
    ClassRows,
    check_classes,
    check_latents,
    diffusion_draws,
    labels_or_null,
    latent_batch,
    official_names,
    run_args,
    tokens_of,
    with_means,
)
from far_training.systems.losses import DiffusionLoss, level_weight, token_losses
from far_training.systems.masks import levels_of, masked_count, visible_indices
from far_training.systems.settings import FARLossSettings, LevelSettings


class LevelLoss(nn.Module):
    """FAR's loss of latents at frequency levels, whatever the network is conditioned on."""

    def __init__(self, grid: int, prediction: str, settings: LevelSettings, filter: str = "spatial") -> None:
        super().__init__()
        self.grid, self.settings = grid, settings
        self.diffusion = DiffusionLoss(prediction, settings.learned_variance)
        self.register_buffer("filters", torch.tensor(lowpass_matrices(grid, filter)), persistent=False)

    def forward(
        self,
        head: DiffusionHead,
        latents: Tensor,
        noisy: Tensor,
        levels: Tensor,
        draws: tuple[Tensor, Tensor],
        features: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """The loss [], and its terms, of scaled latents [B, C, g, g].

        noisy: the latents that the network sees, before the low-pass filter [B, C, g, g].
        levels: [B].
        draws: timesteps and noise of every token, for `token_losses`.
        features: the network, from low-passed tokens [B, L, C] to z [B, L, width].
        """
        inputs = tokens_of(self.lowpass(noisy, levels))
        target = tokens_of(latents if self.settings.simplify else self.lowpass(latents, levels + 1))
        condition = head.condition(features(inputs), levels.reshape(-1, 1, 1))
        error, bound = token_losses(self.diffusion, head, target, condition, *draws)
        per_sample = (error + bound).mean(dim=(1, 2))
        weight = level_weight(levels, self.grid) if self.settings.weight_levels else torch.ones_like(per_sample)
        return {"loss": (weight * per_sample).mean(), "error": error.mean(), "bound": bound.mean()}

    def lowpass(self, latents: Tensor, levels: Tensor) -> Tensor:
        """Latents [B, C, g, g], each low-passed to its level [B]."""
        filters = self.filters[levels].unsqueeze(1)
        return filters @ latents @ filters.transpose(-1, -2)


class FARLosses(nn.Module):
    """FAR's losses of a batch, as `far_task` fetches it."""

    def __init__(self, model: FAR, settings: FARLossSettings) -> None:
        super().__init__()
        self.model = model
        self.level = LevelLoss(model.config.grid, model.config.prediction, settings, model.config.filter)

    def forward(
        self,
        latents: Tensor,
        noisy: Tensor,
        labels: Tensor,
        levels: Tensor,
        visible: Tensor,
        t: Tensor,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """The loss [] and its terms.

        latents, noisy, levels: as in LevelLoss.
        labels: classes [B].
        visible: indices [B, V] of the tokens that the encoder sees, all of them where nothing is masked.
        t, noise: as in `token_losses`.
        """
        config = self.model.config

        def features(inputs: Tensor) -> Tensor:
            embedding = self.model.class_embedding(labels)
            if not config.masked:
                return self.model.features(inputs, embedding)
            return self.model.features(inputs, embedding, visible, restore_indices(visible, config.tokens))

        return self.level(self.model.diffloss.net, latents, noisy, levels, (t, noise), features)


def far_task(
    config: FARConfig,
    settings: FARLossSettings,
    data: LatentSet,
    batch: int,
    seed: int,
    report: Report,
    sampling: Mapping[str, Any] | None = None,
) -> Task:
    """Training of a FAR on latents.

    config: the model's sizes, with the data's latent scale.
    batch: samples of a step.
    seed: of the new weights.
    report: writes the sample sheets.
    sampling: settings that the checkpoint recommends to sample with.
    FarError where model and data do not fit.
    """
    check_latents(data, config.channels, config.grid)
    check_classes(data.source, data.names, config.classes)
    torch.manual_seed(seed)
    model = FAR(config, settings.dropout).initialize()
    classes = ClassRows(data) if settings.first == "mean" else None

    def fetch(rng: SampleRng, progress: float) -> tuple[Tensor, ...]:
        samples = latent_batch(data, settings, config.latent_scale, batch, rng, progress)
        latents = samples.latents
        labels = labels_or_null(data.labels[samples.rows], config.classes, settings.label_drop, rng)
        levels = sample_levels(settings, config.grid, rng)
        if classes is not None:
            latents = with_means(samples, levels, data, classes, config.latent_scale, rng)
        masked = 0
        if config.masked:
            masked = masked_count(settings.mask, int(levels[0]), config.grid, config.tokens, rng.shared)
        visible = visible_indices(rng.uniform(config.tokens), config.tokens - masked)
        draws = diffusion_draws(config.tokens, config.channels, settings.draws, rng)
        return latents, samples.noisy, labels, levels, visible, *draws

    def finish(average: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(average, folder / "far.safetensors", data.names, summary, sampling=sampling)

    return Task(
        system="far",
        model=model,
        losses=FARLosses(model, settings),
        fetch=fetch,
        epoch_length=len(data.train),
        args=run_args("far", config, settings) | official_names(config),
        report=report,
        finish=finish,
        no_decay=("diffloss",),
        has_unused=not config.masked,
        metadata=metadata_of(model, data.names, sampling),
    )


def sample_levels(settings: FARLossSettings, grid: int, rng: SampleRng) -> Tensor:
    """Levels [n] of a step's samples: one of its own for each, or one for all."""
    # Drawn even where it is not used, so that the numbers that follow do not depend on the setting.
    shared = rng.shared.random()
    levels = levels_of(rng.uniform() if settings.per_sample else torch.full((len(rng),), shared), grid, settings.low)
    if settings.first_share:
        numbers = rng.uniform() if settings.per_sample else torch.full((len(rng),), rng.shared.random())
        levels = torch.where(numbers < settings.first_share, 0, levels)
    return levels
