"""Latents as training data: encoded at every step, or read from a cache of moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.kl_vae import AutoencoderKL
from far_models.pictures import PictureSet, load_labels, read_names
from far_runtime.bundle import sha256_of
from far_runtime.errors import FarError, SettingName
from far_training.data.cache import check_vae, encoded_both_ways, read_split, write_json, write_labels
from far_training.data.shards import ROWS, ShardedArray, Shards, open_noted_shards, sharded_folder
from far_training.loop.display import Log
from far_training.loop.processes import ALONE, ProcessGroup

NOTES = "latents.json"
SCALE_PICTURES = 1024
"""Pictures on which the scale of latents is measured that are not cached."""
Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LatentSet:
    """The latents of pictures and of their mirror images, as moments of their posterior."""

    source: Path
    """Folder of the cache or of the pictures."""
    channels: int
    grid: int
    """Side of the latents."""
    scale: float
    """1 / standard deviation of the latents; the networks are trained on latents times this."""
    labels: NDArray[np.int64]
    """Classes [N] of the pictures."""
    names: tuple[str, ...]
    """Names of the classes."""
    train: NDArray[np.int64]
    """Rows to train on."""
    moments: Callable[[NDArray[np.int64], NDArray[np.bool_]], Moments]
    """moments(rows [n], mirrored [n]): mean and log variance [n, C, g, g]."""


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Moments:
    """Mean and log variance [n, C, g, g] of pictures [n, 3, H, W], on the CPU."""
    mean, log_variance = vae.encode(pixels.to(next(vae.parameters()).device))
    return mean.float().cpu(), log_variance.float().cpu()


def latent_scale(mean: NDArray[np.float32], log_variance: NDArray[np.float32]) -> float:
    """1 / standard deviation of the latents with these moments [...]."""
    variance = mean.astype(np.float64).var() + np.exp(log_variance.astype(np.float64)).mean()
    return float(1 / np.sqrt(variance))


def encoded_set(vae: AutoencoderKL, pictures: PictureSet, scale: float | None = None) -> LatentSet:
    """Latents that are encoded at every step; the scale is measured on some training pictures by default."""
    grid = latent_grid(vae.config.stride, pictures)
    if scale is None:
        count = min(SCALE_PICTURES, len(pictures.train))
        rows = pictures.train[np.linspace(0, len(pictures.train) - 1, count).astype(np.int64)]
        parts = [encode(vae, pictures.pixels(rows[i : i + 32])) for i in range(0, len(rows), 32)]
        scale = latent_scale(*(np.concatenate([part[k].numpy() for part in parts]) for k in (0, 1)))

    def moments(rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Moments:
        return encode(vae, pictures.pixels(rows, mirrored))

    return LatentSet(
        source=pictures.source,
        channels=vae.config.channels,
        grid=grid,
        scale=scale,
        labels=pictures.labels,
        names=pictures.names,
        train=pictures.train,
        moments=moments,
    )


def latent_grid(stride: int, pictures: PictureSet) -> int:
    """Side of the pictures' latents; FarError unless the VAE's stride divides the pictures' side."""
    if pictures.size % stride:
        raise FarError(
            f"{pictures.source}: pictures of {pictures.size} pixels do not fit a VAE of stride {stride}; use ",
            SettingName("size"),
        )
    return pictures.size // stride


def write_cache(
    vae: AutoencoderKL,
    vae_file: Path,
    pictures: PictureSet,
    out: Path,
    batch: int,
    log: Log,
    half: bool = False,
    group: ProcessGroup = ALONE,
) -> float | None:
    """Write the moments of all pictures and their mirror images; returns the latent scale in the main process.

    The folder holds shards [rows, 2, 2, C, g, g] (plain, mirrored; mean, log variance) in float32, or float16 if
    `half`, labels.npy, names.json, split.json and latents.json. It appears whole; an interrupted run goes on. FarError
    if the folder exists already.
    """
    latent_grid(vae.config.stride, pictures)
    dtype = np.float16 if half else np.float32

    def encoded(images: NDArray[np.uint8]) -> NDArray[np.floating]:
        return encoded_both_ways(lambda pixels: torch.stack(encode(vae, pixels), dim=1), images).numpy().astype(dtype)

    array = ShardedArray(count=len(pictures.labels), rows=ROWS, read=pictures.read, encode=encoded, batch=batch)
    facts = {"pictures": pictures.source.name, "vae_sha256": sha256_of(vae_file), "count": array.count, "rows": ROWS}
    facts["type"] = np.dtype(dtype).name
    with sharded_folder(out, facts, array, log, group) as folder:
        if folder is None:
            return None
        scale = scale_of(Shards(folder, array.count, ROWS), pictures.train)
        write_labels(folder, pictures)
        write_json(folder / NOTES, {**facts, "latent_scale": scale})
    return scale


def scale_of(shards: Shards, train: NDArray[np.int64]) -> float:
    """1 / standard deviation of the plain training pictures' latents, summed a shard at a time."""
    is_train = np.zeros(shards.count, bool)
    is_train[train] = True
    count, first, second, noise = 0, 0.0, 0.0, 0.0
    for rows, shard in shards.blocks():
        mean, log_variance = (shard[is_train[rows], 0, part].astype(np.float64) for part in (0, 1))
        count += mean.size
        first, second = first + mean.sum(), second + np.square(mean).sum()
        noise += np.exp(log_variance).sum()
    return float(1 / np.sqrt(second / count - (first / count) ** 2 + noise / count))


def open_cache(path: Path, vae_file: Path | None = None) -> LatentSet:
    """Open a folder that `write_cache` wrote; FarError if it is none, or made with another VAE than `vae_file`."""
    notes, train = read_split(path, NOTES, "cache-latents")
    if vae_file is not None:
        check_vae(path, notes.get("vae_sha256"), vae_file)
    scale = notes.get("latent_scale")
    if not isinstance(scale, float) or not scale > 0:
        raise FarError(f"{path / NOTES}: lacks a latent_scale; make it again with far train cache-latents")
    shards = open_noted_shards(path, notes, NOTES)
    if len(shards.shape) != 6 or shards.shape[1:3] != (2, 2) or shards.shape[4] != shards.shape[5]:
        raise FarError(f"{path}: shards of {list(shards.shape)}; expected [N, 2, 2, C, g, g]")
    labels = load_labels(path / "labels.npy", shards.count)

    def moments(rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Moments:
        values = torch.from_numpy(shards.pick(rows, mirrored)).float()
        return values[:, 0], values[:, 1]

    return LatentSet(
        source=path,
        channels=shards.shape[3],
        grid=shards.shape[4],
        scale=scale,
        labels=labels,
        names=read_names(path, labels),
        train=train,
        moments=moments,
    )
