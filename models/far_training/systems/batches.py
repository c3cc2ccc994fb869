"""What the trainers on latents have in common: a batch of latents and labels, and whether model and data fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.far import FARConfig
from far_models.far_t2i import FART2IConfig
from far_models.pictures import visiting_order
from far_runtime.errors import FarError
from far_runtime.sampling.noise_schedule import TRAIN_STEPS
from far_training.data.latents import LatentSet
from far_training.loop.randomness import SampleRng

MEANS = 16
"""Pictures whose means a sample takes at level 0."""


def rows_of(train: NDArray[np.int64], batch: int, chance: SampleRng) -> NDArray[np.int64]:
    """The rows of a step's samples."""
    return train[visiting_order(chance.step, batch, len(train), chance.seed)[chance.places]]


def drawn_latents(data: LatentSet, rows: NDArray[np.int64], scale: float, flip: float, chance: SampleRng) -> Tensor:
    """Latents [n, C, g, g] drawn from their posterior, times `scale`; a share `flip` of them is mirrored."""
    mean, log_variance = data.moments(rows, chance.happens(flip).numpy())
    return scale * (mean + chance.normal(*mean.shape[1:]) * (0.5 * log_variance).exp())


class Classes:
    """The training pictures by class."""

    def __init__(self, data: LatentSet) -> None:
        labels = data.labels[data.train]
        order = np.argsort(labels, kind="stable")
        self._rows, self._labels = data.train[order], labels[order]

    def members(self, label: int) -> NDArray[np.int64]:
        """Rows [n] of the training pictures of a class; none for one that has no picture."""
        start, end = np.searchsorted(self._labels, (label, label + 1))
        return self._rows[start:end]


def drawn_means(
    latents: Tensor,
    levels: Tensor,
    data: LatentSet,
    rows: NDArray[np.int64],
    classes: Classes,
    scale: float,
    flip: float,
    chance: SampleRng,
) -> Tensor:
    """Latents [n, C, g, g] with means of latents in the place of those samples' whose level is 0.

    Level 0 sees nothing of a picture. So every cell takes the mean of some picture of the class, out of MEANS that
    are drawn, times `scale`, a share `flip` of them mirrored: far more of the distribution than one picture's mean in
    all cells.
    """
    grid = latents.shape[-1]
    which, mirrored = chance.uniform(MEANS).numpy(), (chance.uniform(MEANS) < flip).numpy()
    cells = chance.integers(MEANS, grid * grid)
    found = latents.clone()
    for i in torch.nonzero(levels == 0).flatten().tolist():
        members = classes.members(int(data.labels[rows[i]]))
        mean, _ = data.moments(members[(which[i] * len(members)).astype(np.int64)], mirrored[i])
        values = scale * mean.mean(dim=(2, 3))
        found[i] = values[cells[i]].T.reshape(latents.shape[1:])
    return found


def disturbed_latents(latents: Tensor, most: float, chance: SampleRng) -> Tensor:
    """Latents [n, C, g, g] with noise of a deviation of `most` |n| per sample, n standard normal."""
    if not most:
        return latents
    deviation = most * chance.normal().abs()
    return latents + deviation.reshape(-1, 1, 1, 1) * chance.normal(*latents.shape[1:])


def dropped_labels(labels: NDArray[np.int64], null: int, share: float, chance: SampleRng) -> Tensor:
    """Labels [n], a share of them replaced by the null class."""
    return torch.where(chance.happens(share), null, torch.from_numpy(labels))


def diffusion_draws(tokens: int, channels: int, draws: int, chance: SampleRng) -> tuple[Tensor, Tensor]:
    """Timesteps [n, tokens, draws] and noise [n, tokens, draws, channels] for `token_losses`."""
    return chance.integers(TRAIN_STEPS, tokens, draws), chance.normal(tokens, draws, channels)


def tokens_of(latents: Tensor) -> Tensor:
    """[B, C, g, g] -> [B, g g, C]."""
    return latents.flatten(2).transpose(1, 2)


def check_latents(data: LatentSet, channels: int, grid: int) -> None:
    """FarError unless the latents are of these channels and this grid."""
    if (data.channels, data.grid) != (channels, grid):
        raise FarError(
            f"{data.source}: latents of {data.channels} channels on a {data.grid} x {data.grid} grid; "
            f"the model takes {channels} on {grid} x {grid}"
        )


def check_classes(source: object, names: tuple[str, ...], classes: int) -> None:
    """FarError if the data has more classes than the model."""
    if len(names) > classes:
        raise FarError(f"{source}: {len(names)} classes; the model has {classes}; use --classes")


def run_args(system: str, config: Any, settings: Any) -> dict[str, Any]:
    """What a training state records as `args`: the system, the model's sizes and, after "loss_", the settings."""
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return {"system": system, **sizes, **{f"loss_{key}": value for key, value in asdict(settings).items()}}


def official_names(config: FARConfig) -> dict[str, Any]:
    """The fields that official training arguments call otherwise."""
    return {"mask": config.masked, "diffloss_d": config.head_depth, "diffloss_w": config.head_width}


def continuous_config(base: Any, data: LatentSet, given: Mapping[str, int | float | str | None]) -> Any:
    """`base`, a FARConfig or FART2IConfig, fitted to the latents, with the given sizes changed (None: not given).

    width, depth and heads count for encoder and decoder. FarError where the heads do not divide the width.
    """
    from dataclasses import replace

    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name in ("width", "depth", "heads"):
        value = changes.pop(name, None)
        if value is not None:
            changes |= {f"encoder_{name}": value, f"decoder_{name}": value}
    scale = changes.pop("latent_scale", data.scale)
    config = replace(base, grid=data.grid, channels=data.channels, latent_scale=scale, **changes)
    check_heads(config.encoder_width, config.encoder_heads)
    if isinstance(config, FART2IConfig):
        return replace(config, head_dim=config.encoder_width // config.encoder_heads)
    return config


def check_heads(width: int, heads: int) -> None:
    """FarError unless the heads divide the width."""
    if width % heads:
        raise FarError(f"--heads {heads} does not divide the width {width}; choose another --heads or --width")
