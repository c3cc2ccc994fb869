"""Training of FAR: which level, which mask, which target, which loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from far_models.far import FAR, FARConfig, restore_indices
from far_models.training.data import visiting_order
from far_models.training.latents import LatentSet
from far_models.training.loop import Task
from far_models.training.losses import DiffusionLoss, level_weight
from far_models.training.masks import draw_levels, masked_count, visible_indices
from far_models.training.zoo import export_checkpoint
from far_runtime.diffusion import TRAIN_STEPS
from far_runtime.errors import FarError
from far_runtime.frequency import lowpass_matrices


@dataclass(frozen=True)
class FARLossSettings:
    """The techniques of the paper and of the released code, each of which can be switched.

    simplify: the target is the full latents at every level (distribution modelling simplification); otherwise it is
    the latents low-passed to the next level. weight_levels: frequency-aware loss weight. mask: off, or the
    frequency-aware mask of the paper or of the code. per_sample: one level per sample rather than per batch. low: more
    weight on low levels (see draw_levels). label_drop: share of samples that learn the null class. input_noise: latents
    are disturbed with a deviation of input_noise |n| per sample, n standard normal, before the low-pass. draws: noise
    draws per token (diffusion_batch_mul). flip: share of mirrored samples, until a share flip_until of the run.
    learned_variance: the variational bound is part of the loss.
    """

    simplify: bool = True
    weight_levels: bool = True
    mask: str = "off"
    per_sample: bool = False
    low: float = 0.0
    label_drop: float = 0.1
    input_noise: float = 0.0
    draws: int = 4
    flip: float = 0.5
    flip_until: float = 1.0
    dropout: float = 0.1
    learned_variance: bool = True

    def __post_init__(self) -> None:
        if self.mask != "off" and self.per_sample:
            raise FarError(
                "a masked model takes one level per batch, since all samples of a batch show equally many tokens; "
                "use --levels batch"
            )


class FARLosses(nn.Module):
    """Losses of scaled latents [B, C, g, g] with input-noise deviations, labels, levels [B] and visible indices [B, V].

    V = L when nothing is masked. Noise and timesteps are drawn here.
    """

    def __init__(self, model: FAR, settings: FARLossSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.diffusion = DiffusionLoss(model.config.prediction, settings.learned_variance)
        self.register_buffer("filters", torch.tensor(lowpass_matrices(model.config.grid)), persistent=False)

    def forward(
        self, latents: Tensor, deviation: Tensor, labels: Tensor, levels: Tensor, visible: Tensor
    ) -> dict[str, Tensor]:
        settings, config = self.settings, self.model.config
        disturbed = latents + deviation.reshape(-1, 1, 1, 1) * torch.randn_like(latents)
        shown = tokens_of(self.lowpass(disturbed, levels))
        target = tokens_of(latents if settings.simplify else self.lowpass(latents, levels + 1))
        restore = None
        if config.masked:
            restore = restore_indices(visible, config.tokens)
        embedding = self.model.class_embedding(labels)
        z = self.model.features(shown, embedding, visible if config.masked else None, restore)
        head = self.model.diffloss.net
        condition = head.condition(z, levels.reshape(-1, 1, 1)).unsqueeze(2)
        target = target.unsqueeze(2).expand(-1, -1, settings.draws, -1)
        t = torch.randint(TRAIN_STEPS, target.shape[:-1], device=target.device)
        error, bound = self.diffusion(head, target, condition, t, torch.randn_like(target))
        per_sample = (error + bound).mean(dim=(1, 2))
        weight = level_weight(levels, config.grid) if settings.weight_levels else torch.ones_like(per_sample)
        return {"loss": (weight * per_sample).mean(), "error": error.mean(), "bound": bound.mean()}

    def lowpass(self, latents: Tensor, levels: Tensor) -> Tensor:
        """Latents [B, C, g, g], each low-passed to its level."""
        filters = self.filters[levels].unsqueeze(1)
        return filters @ latents @ filters.transpose(-1, -2)


def tokens_of(latents: Tensor) -> Tensor:
    """[B, C, g, g] -> [B, g g, C]."""
    return latents.flatten(2).transpose(1, 2)


def far_task(
    config: FARConfig,
    settings: FARLossSettings,
    data: LatentSet,
    batch: int,
    seed: int,
    report: Callable[[nn.Module, int, Path], dict[str, float]],
) -> Task:
    """Training of a FAR on latents; `config.latent_scale` is the data's."""
    if (data.channels, data.grid) != (config.channels, config.grid):
        raise FarError(
            f"{data.source}: latents of {data.channels} channels on a {data.grid} x {data.grid} grid; "
            f"the model takes {config.channels} on {config.grid} x {config.grid}"
        )
    if len(data.names) > config.classes:
        raise FarError(f"{data.source}: {len(data.names)} classes; the model has {config.classes}; use --classes")
    torch.manual_seed(seed)
    model = FAR(config, settings.dropout).initialize()
    losses = FARLosses(model, settings)

    def fetch(step: int, rank: int, world: int, done: float) -> tuple[Tensor, ...]:
        rows = data.train[visiting_order(step, batch, len(data.train), seed)][rank::world]
        count = len(rows)
        flip = torch.rand(count).numpy() < (settings.flip if done < settings.flip_until else 0.0)
        mean, log_variance = data.moments(rows, flip)
        latents = config.latent_scale * (mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
        deviation = settings.input_noise * torch.randn(count).abs()
        drop = torch.rand(count) < settings.label_drop
        labels = torch.where(drop, config.classes, torch.from_numpy(data.labels[rows]))
        chance = np.random.default_rng((seed, step, rank, 1))
        levels = draw_levels(count, config.grid, settings.per_sample, settings.low, chance)
        hidden = masked_count(settings.mask, int(levels[0]), config.grid, config.tokens, chance) if config.masked else 0
        return latents, deviation, labels, levels, visible_indices(count, config.tokens, config.tokens - hidden)

    args: dict[str, Any] = {"system": "far", **asdict(config), **official_names(config)}
    args |= {f"loss_{key}": value for key, value in asdict(settings).items()}

    def finish(ema: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(ema, folder / "far.safetensors", data.names, summary)

    unused = not config.masked
    return Task(
        "far", model, losses, fetch, len(data.train), args, report, finish, no_decay=("diffloss",), unused=unused
    )


def official_names(config: FARConfig) -> dict[str, Any]:
    """The fields that official training arguments call otherwise."""
    return {"mask": config.masked, "diffloss_d": config.head_depth, "diffloss_w": config.head_width}
