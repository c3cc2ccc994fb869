"""What the trainers on latents have in common: batches of latents and labels, and whether model and data fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.far import FARConfig
from far_models.far_t2i import FART2IConfig
from far_models.pictures import visiting_order
from far_runtime.errors import FarError, SettingName
from far_runtime.sampling.noise_schedule import TRAIN_STEPS
from far_training.data.latents import LatentSet
from far_training.loop.randomness import SampleRng
from far_training.systems.settings import DiffusionSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound=FARConfig | FART2IConfig)
MEAN_PICTURES = 16
"""Pictures whose means a sample takes at level 0."""


@dataclass(frozen=True)
class LatentBatch:
    """The latents of a step's samples."""

    rows: NDArray[np.int64]
    """Row [n] of each sample in the data."""
    mirrored: float
    """Share of the samples that are mirrored."""
    latents: Tensor
    """Latents [n, C, g, g] in the network's scale, which the head learns to draw."""
    noisy: Tensor
    """The latents with the input noise, as the network sees them."""


def latent_batch(
    data: LatentSet, settings: DiffusionSettings, scale: float, batch: int, rng: SampleRng, progress: float
) -> LatentBatch:
    """The samples of a step at the places of `rng`, at a share `progress` of the run.

    scale: factor of the latents. batch: samples of the whole step.
    """
    rows = sample_rows(data.train, batch, rng)
    mirrored = settings.flip_share(progress)
    latents = posterior_latents(data, rows, scale, mirrored, rng)
    return LatentBatch(rows, mirrored, latents, noisy_latents(latents, settings.input_noise, rng))


def sample_rows(train: NDArray[np.int64], batch: int, rng: SampleRng) -> NDArray[np.int64]:
    """Rows [n] of a step's samples among the training rows, for a step of `batch` samples."""
    return train[visiting_order(rng.step, batch, len(train), rng.seed)[rng.places]]


def posterior_latents(
    data: LatentSet, rows: NDArray[np.int64], scale: float, mirrored: float, rng: SampleRng
) -> Tensor:
    """Latents [n, C, g, g] drawn from their posterior, times `scale`; a share `mirrored` of them is mirrored."""
    mean, log_variance = data.moments(rows, rng.bernoulli(mirrored).numpy())
    return scale * (mean + rng.normal(*mean.shape[1:]) * (0.5 * log_variance).exp())


def noisy_latents(latents: Tensor, noise: float, rng: SampleRng) -> Tensor:
    """Latents [n, C, g, g] plus noise of standard deviation `noise` |n| per sample, n standard normal."""
    if not noise:
        return latents
    deviation = noise * rng.normal().abs()
    return latents + deviation.reshape(-1, 1, 1, 1) * rng.normal(*latents.shape[1:])


class ClassRows:
    """The training rows of each class."""

    def __init__(self, data: LatentSet) -> None:
        labels = data.labels[data.train]
        order = np.argsort(labels, kind="stable")
        self._rows, self._labels = data.train[order], labels[order]

    def __getitem__(self, label: int) -> NDArray[np.int64]:
        """Rows [n] of the training pictures of a class."""
        start, end = np.searchsorted(self._labels, (label, label + 1))
        return self._rows[start:end]


def with_means(
    batch: LatentBatch, levels: Tensor, data: LatentSet, classes: ClassRows, scale: float, rng: SampleRng
) -> Tensor:
    """The latents [n, C, g, g] of a batch, with means of latents for those samples whose level [n] is 0.

    Level 0 sees nothing of a picture. So every cell takes the mean of one of MEAN_PICTURES random pictures of the
    class, times `scale`, which shows far more of the distribution than one picture's mean in all cells.
    """
    grid = batch.latents.shape[-1]
    picks = rng.uniform(MEAN_PICTURES).numpy()
    mirrored = (rng.uniform(MEAN_PICTURES) < batch.mirrored).numpy()
    cells = rng.integers(MEAN_PICTURES, grid * grid)
    latents = batch.latents.clone()
    for i in torch.nonzero(levels == 0).flatten().tolist():
        members = classes[int(data.labels[batch.rows[i]])]
        mean, _ = data.moments(members[(picks[i] * len(members)).astype(np.int64)], mirrored[i])
        values = scale * mean.mean(dim=(2, 3))
        latents[i] = values[cells[i]].T.reshape(latents.shape[1:])
    return latents


def labels_or_null(labels: NDArray[np.int64], null: int, share: float, rng: SampleRng) -> Tensor:
    """Labels [n], a share of them replaced by the null class."""
    return torch.where(rng.bernoulli(share), null, torch.from_numpy(labels))


def diffusion_draws(tokens: int, channels: int, draws: int, rng: SampleRng) -> tuple[Tensor, Tensor]:
    """Timesteps [n, tokens, draws] and noise [n, tokens, draws, channels] for `token_losses`."""
    return rng.integers(TRAIN_STEPS, tokens, draws), rng.normal(tokens, draws, channels)


def tokens_of(latents: Tensor) -> Tensor:
    """[B, C, g, g] -> [B, g g, C]."""
    return latents.flatten(2).transpose(1, 2)


def check_latents(data: LatentSet, channels: int, grid: int) -> None:
    """FarError unless the latents have this many channels and this side."""
    if (data.channels, data.grid) != (channels, grid):
        raise FarError(
            f"{data.source}: latents of {data.channels} channels on a {data.grid} x {data.grid} grid; "
            f"the model takes {channels} on {grid} x {grid}"
        )


def check_classes(source: object, names: tuple[str, ...], classes: int) -> None:
    """FarError if the data has more classes than the model."""
    if len(names) > classes:
        raise FarError(f"{source}: {len(names)} classes; the model has {classes}; use ", SettingName("classes"))


def run_args(system: str, config: DataclassInstance, *settings: DataclassInstance) -> dict[str, Any]:
    """What a training state records as `args`: the system, the model's sizes and, after "loss_", the settings."""
    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return {
        "system": system,
        **sizes,
        **{f"loss_{name}": value for part in settings for name, value in asdict(part).items()},
    }


def official_names(config: FARConfig) -> dict[str, Any]:
    """The sizes that have other names in official training arguments."""
    return {"mask": config.masked, "diffloss_d": config.head_depth, "diffloss_w": config.head_width}


def continuous_config(base: Config, data: LatentSet, sizes: Mapping[str, int | float | str | None]) -> Config:
    """`base`, fitted to the latents and with other sizes where they are not None.

    width, depth and heads count for encoder and decoder. FarError where the heads do not divide the width.
    """
    changes: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    for name in ("width", "depth", "heads"):
        value = changes.pop(name, None)
        if value is not None:
            changes |= {f"encoder_{name}": value, f"decoder_{name}": value}
    changes = {"latent_scale": data.scale, **changes, "grid": data.grid, "channels": data.channels}
    width, heads = (changes.get(name, getattr(base, name)) for name in ("encoder_width", "encoder_heads"))
    check_heads(width, heads)
    if isinstance(base, FART2IConfig):
        changes["head_dim"] = width // heads
    return replace(base, **changes)


def check_heads(width: int, heads: int) -> None:
    """FarError unless the heads divide the width."""
    if width % heads:
        raise FarError(
            SettingName("heads"),
            f" {heads} does not divide the width {width}; choose another ",
            SettingName("heads"),
            " or ",
            SettingName("width"),
        )
