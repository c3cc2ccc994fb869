"""Training of FAR: which level, which mask, which target, which loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far_models.checkpoint.save import export_checkpoint, metadata_of
from far_models.far import FAR, FARConfig, restore_indices
from far_models.head import DiffusionHead
from far_runtime.errors import FarError
from far_runtime.sampling.lowpass import lowpass_matrices
from far_training.data.latents import LatentSet
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Task
from far_training.systems.batches import (
    Classes,
    check_classes,
    check_latents,
    diffusion_draws,
    disturbed_latents,
    drawn_latents,
    drawn_means,
    dropped_labels,
    official_names,
    rows_of,
    run_args,
    tokens_of,
)
from far_training.systems.losses import DiffusionLoss, level_weight, token_losses
from far_training.systems.masks import draw_levels, masked_count, visible_indices


@dataclass(frozen=True)
class FARLossSettings:
    """The techniques of the paper and of the released code, each of which can be switched.

    simplify: the target is the full latents at every level (distribution modelling simplification); otherwise it is
    the latents low-passed to the next level. first: what the first level learns to draw, which sees nothing but the
    class: "latents" as the other levels, or "mean", the one value that is left of a picture's latents at level 1. In
    latents, that value comes out as the mean of tokens that were drawn one by one, between the pictures of a class;
    drawn itself, with one noise for all tokens (`shared_noise` of the sampler), it is that of one picture.
    weight_levels: frequency-aware loss weight. mask: off, or the frequency-aware mask of the paper or of the code.
    per_sample: one level per sample rather than per batch. low: more weight on low levels (see draw_levels).
    first_share: share of samples (of batches) that learn the first level, whatever level was drawn for them.
    label_drop: share of samples that learn the null class. input_noise: latents are disturbed with a deviation of
    input_noise |n| per sample, n standard normal, before the low-pass. draws: noise draws per token
    (diffusion_batch_mul). flip: share of mirrored samples, until a share flip_until of the run. learned_variance: the
    variational bound is part of the loss.
    """

    simplify: bool = True
    first: str = "latents"
    weight_levels: bool = True
    mask: str = "off"
    per_sample: bool = False
    low: float = 0.0
    first_share: float = 0.0
    label_drop: float = 0.1
    input_noise: float = 0.0
    draws: int = 4
    flip: float = 0.5
    flip_until: float = 1.0
    dropout: float = 0.1
    learned_variance: bool = True

    def __post_init__(self) -> None:
        if self.first == "mean" and not self.simplify:
            raise FarError("--first mean: without simplification the first level draws the mean anyway; use --simplify")
        if self.mask != "off" and self.per_sample:
            raise FarError(
                "a masked model takes one level per batch, since all samples of a batch show equally many tokens; "
                "use --levels batch"
            )


class LevelLoss(nn.Module):
    """FAR's loss of latents at frequency levels, whatever the network is conditioned on.

    `disturbed`: the latents as they are shown, before the low-pass. `draws`: timesteps and noise of every token.
    `features`: shown tokens [B, L, C] -> z [B, L, width].
    """

    def __init__(
        self,
        grid: int,
        prediction: str,
        simplify: bool,
        weight_levels: bool,
        learned_variance: bool,
        filter: str = "spatial",
    ) -> None:
        super().__init__()
        self.grid, self.simplify, self.weight_levels = grid, simplify, weight_levels
        self.diffusion = DiffusionLoss(prediction, learned_variance)
        self.register_buffer("filters", torch.tensor(lowpass_matrices(grid, filter)), persistent=False)

    def forward(
        self,
        head: DiffusionHead,
        latents: Tensor,
        disturbed: Tensor,
        levels: Tensor,
        draws: tuple[Tensor, Tensor],
        features: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        shown = tokens_of(self.lowpass(disturbed, levels))
        target = tokens_of(latents if self.simplify else self.lowpass(latents, levels + 1))
        condition = head.condition(features(shown), levels.reshape(-1, 1, 1))
        error, bound = token_losses(self.diffusion, head, target, condition, *draws)
        per_sample = (error + bound).mean(dim=(1, 2))
        weight = level_weight(levels, self.grid) if self.weight_levels else torch.ones_like(per_sample)
        return {"loss": (weight * per_sample).mean(), "error": error.mean(), "bound": bound.mean()}

    def lowpass(self, latents: Tensor, levels: Tensor) -> Tensor:
        """Latents [B, C, g, g], each low-passed to its level."""
        filters = self.filters[levels].unsqueeze(1)
        return filters @ latents @ filters.transpose(-1, -2)


class FARLosses(nn.Module):
    """Losses of scaled latents [B, C, g, g], the same as they are shown, labels, levels [B], visible indices [B, V],
    and timesteps and noise of every token (`token_losses`).

    V = L when nothing is masked.
    """

    def __init__(self, model: FAR, settings: FARLossSettings) -> None:
        super().__init__()
        self.model = model
        self.level = LevelLoss(
            model.config.grid,
            model.config.prediction,
            settings.simplify,
            settings.weight_levels,
            settings.learned_variance,
            model.config.filter,
        )

    def forward(
        self,
        latents: Tensor,
        disturbed: Tensor,
        labels: Tensor,
        levels: Tensor,
        visible: Tensor,
        t: Tensor,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        config = self.model.config

        def features(shown: Tensor) -> Tensor:
            embedding = self.model.class_embedding(labels)
            if not config.masked:
                return self.model.features(shown, embedding)
            return self.model.features(shown, embedding, visible, restore_indices(visible, config.tokens))

        return self.level(self.model.diffloss.net, latents, disturbed, levels, (t, noise), features)


def far_task(
    config: FARConfig,
    settings: FARLossSettings,
    data: LatentSet,
    batch: int,
    seed: int,
    report: Callable[[nn.Module, int, Path], dict[str, float]],
    sampling: Mapping[str, Any] | None = None,
) -> Task:
    """Training of a FAR on latents; `config.latent_scale` is the data's. sampling: the settings that the checkpoint
    recommends to draw with."""
    check_latents(data, config.channels, config.grid)
    check_classes(data.source, data.names, config.classes)
    torch.manual_seed(seed)
    model = FAR(config, settings.dropout).initialize()
    losses = FARLosses(model, settings)
    classes = Classes(data) if settings.first == "mean" else None

    def fetch(chance: SampleRng, done: float) -> tuple[Tensor, ...]:
        rows = rows_of(data.train, batch, chance)
        flip = settings.flip if done < settings.flip_until else 0.0
        latents = drawn_latents(data, rows, config.latent_scale, flip, chance)
        disturbed = disturbed_latents(latents, settings.input_noise, chance)
        labels = dropped_labels(data.labels[rows], config.classes, settings.label_drop, chance)
        one = torch.full((len(rows),), chance.of_step.random())
        levels = draw_levels(chance.uniform() if settings.per_sample else one, config.grid, settings.low)
        if settings.first_share:
            drawn = chance.uniform() if settings.per_sample else torch.full((len(rows),), chance.of_step.random())
            levels = torch.where(drawn < settings.first_share, 0, levels)
        if classes is not None:
            latents = drawn_means(latents, levels, data, rows, classes, config.latent_scale, flip, chance)
        hidden = 0
        if config.masked:
            hidden = masked_count(settings.mask, int(levels[0]), config.grid, config.tokens, chance.of_step)
        visible = visible_indices(chance.uniform(config.tokens), config.tokens - hidden)
        draws = diffusion_draws(config.tokens, config.channels, settings.draws, chance)
        return latents, disturbed, labels, levels, visible, *draws

    def finish(ema: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(ema, folder / "far.safetensors", data.names, summary, sampling=sampling)

    return Task(
        "far",
        model,
        losses,
        fetch,
        len(data.train),
        run_args("far", config, settings) | official_names(config),
        report,
        finish,
        no_decay=("diffloss",),
        unused=not config.masked,
        metadata=metadata_of(model, data.names, sampling),
    )
