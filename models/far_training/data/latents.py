"""Latents as training data: encoded on the fly, or read from a cache of moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.kl_vae import AutoencoderKL
from far_models.pictures import PictureSet, load_labels, normalised, read_names
from far_runtime.errors import FarError
from far_training.data.cache import (
    check_vae,
    file_digest,
    read_split,
    write_json,
    write_labels,
)
from far_training.data.shards import ROWS, Shards, begin, finish, write_shards
from far_training.loop.processes import ALONE, ProcessGroup

NOTES = "latents.json"
Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LatentSet:
    """Moments of pictures and of their mirror images: moments(rows [n], flip [n]) -> mean, log variance [n, C, g, g].

    `scale` is 1 / standard deviation of the latents, by which the networks' are multiplied; `train` are the rows to
    train on.
    """

    source: Path
    channels: int
    grid: int
    scale: float
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    train: NDArray[np.int64]
    moments: Callable[[NDArray[np.int64], NDArray[np.bool_]], Moments]


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
    """Latents that are encoded at every step; the scale is measured on up to 1024 training pictures unless given."""
    check_fit(vae.config.stride, pictures)
    if scale is None:
        rows = pictures.train[np.linspace(0, len(pictures.train) - 1, min(1024, len(pictures.train))).astype(np.int64)]
        parts = [encode(vae, pictures.pixels(rows[i : i + 32])) for i in range(0, len(rows), 32)]
        scale = latent_scale(*(np.concatenate([part[k].numpy() for part in parts]) for k in (0, 1)))
    grid = pictures.size // vae.config.stride

    def moments(rows: NDArray[np.int64], flip: NDArray[np.bool_]) -> Moments:
        return encode(vae, pictures.pixels(rows, flip))

    return LatentSet(
        pictures.source, vae.config.channels, grid, scale, pictures.labels, pictures.names, pictures.train, moments
    )


def check_fit(stride: int, pictures: PictureSet) -> None:
    """FarError unless the VAE's stride divides the pictures' side."""
    if pictures.size % stride:
        raise FarError(
            f"{pictures.source}: pictures of {pictures.size} pixels do not fit a VAE of stride {stride}; use --size"
        )


def write_cache(
    vae: AutoencoderKL,
    vae_file: Path,
    pictures: PictureSet,
    out: Path,
    batch: int,
    say: Callable[[str], None],
    half: bool = False,
    together: ProcessGroup = ALONE,
) -> float | None:
    """Write the moments of all pictures, plain and mirrored; returns the latent scale (the main process alone).

    The folder holds shards [rows, 2, 2, C, g, g] (plain, mirrored; mean, log variance) in float32, or float16 if
    `half`, labels.npy, names.json, split.json and latents.json, and appears whole. A run that is ended goes on, and
    several processes share the shards. FarError if the folder exists already.
    """
    check_fit(vae.config.stride, pictures)
    count, kind = len(pictures.labels), np.float16 if half else np.float32
    facts = {"pictures": pictures.source.name, "vae_sha256": file_digest(vae_file), "count": count, "rows": ROWS}
    facts["type"] = np.dtype(kind).name

    def encoded(images: NDArray[np.uint8]) -> NDArray[np.floating]:
        sides = [torch.stack(encode(vae, normalised(side)), dim=1) for side in (images, images[:, :, ::-1])]
        return torch.stack(sides, dim=1).numpy().astype(kind)

    staging = begin(out, facts)
    write_shards(staging, count, ROWS, pictures.read, encoded, batch, say, together.rank, together.world)
    together.wait()
    if together.rank:
        return None
    scale = scale_of(Shards(staging, count, ROWS), pictures.train)
    write_labels(staging, pictures)
    write_json(staging / NOTES, {**facts, "latent_scale": scale})
    finish(staging, out)
    return scale


def scale_of(shards: Shards, train: NDArray[np.int64]) -> float:
    """1 / standard deviation of the plain training pictures' latents, a shard at a time."""
    chosen = np.zeros(shards.count, bool)
    chosen[train] = True
    total, first, second, noise = 0, 0.0, 0.0, 0.0
    for rows, shard in shards.blocks():
        mean, log_variance = (shard[chosen[rows], 0, part].astype(np.float64) for part in (0, 1))
        total += mean.size
        first, second = first + mean.sum(), second + np.square(mean).sum()
        noise += np.exp(log_variance).sum()
    return float(1 / np.sqrt(second / total - (first / total) ** 2 + noise / total))


def open_cache(path: Path, vae_file: Path | None = None) -> LatentSet:
    """Open a folder that `write_cache` wrote; FarError if it is none, or was made with another VAE than `vae_file`."""
    notes, train = read_split(path, NOTES, "cache-latents")
    if vae_file is not None:
        check_vae(path, notes.get("vae_sha256"), vae_file)
    scale, count, rows = (notes.get(key) for key in ("latent_scale", "count", "rows"))
    if not isinstance(scale, float) or not scale > 0 or not isinstance(count, int) or not isinstance(rows, int):
        raise FarError(
            f"{path / NOTES}: lacks latent_scale, count or rows, so an earlier version made it; make it again with far "
            "train cache-latents"
        )
    shards = Shards(path, count, rows)
    if len(shards.shape) != 6 or shards.shape[1:3] != (2, 2) or shards.shape[4] != shards.shape[5]:
        raise FarError(f"{path}: shards of {list(shards.shape)}; expected [N, 2, 2, C, g, g]")
    labels = load_labels(path / "labels.npy", count)

    def moments(rows: NDArray[np.int64], flip: NDArray[np.bool_]) -> Moments:
        chosen = torch.from_numpy(shards[rows][np.arange(len(rows)), flip.astype(np.int64)]).float()
        return chosen[:, 0], chosen[:, 1]

    _, _, _, channels, grid, _ = shards.shape
    return LatentSet(path, channels, grid, scale, labels, read_names(path, labels), train, moments)
