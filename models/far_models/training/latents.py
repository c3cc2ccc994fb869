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
from far_models.training.cache import (
    check_vae,
    every_picture,
    file_digest,
    new_folder,
    read_split,
    write_json,
    write_labels,
)
from far_models.training.data import PictureSet, load_array, load_labels, read_names
from far_runtime.errors import FarError

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
def encode(vae: AutoencoderKL, pictures: PictureSet, rows: NDArray[np.int64], flip: NDArray[np.bool_]) -> Moments:
    """Mean and log variance [n, C, g, g] of some rows, on the CPU."""
    device = next(vae.parameters()).device
    mean, log_variance = vae.encode(pictures.pixels(rows, flip).to(device))
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
        parts = [
            encode(vae, pictures, rows[i : i + 32], np.zeros(len(rows[i : i + 32]), bool))
            for i in range(0, len(rows), 32)
        ]
        scale = latent_scale(*(np.concatenate([part[k].numpy() for part in parts]) for k in (0, 1)))
    grid = pictures.size // vae.config.stride

    def moments(rows: NDArray[np.int64], flip: NDArray[np.bool_]) -> Moments:
        return encode(vae, pictures, rows, flip)

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
    vae: AutoencoderKL, vae_file: Path, pictures: PictureSet, out: Path, batch: int, say: Callable[[str], None]
) -> float:
    """Write the moments of all pictures, plain and mirrored, as memory-mappable arrays; returns the latent scale.

    The folder holds mean.npy and logvar.npy [N, 2, C, g, g] (index 1: mirrored), labels.npy, names.json, split.json and
    latents.json, and appears whole. FarError if it exists already.
    """
    check_fit(vae.config.stride, pictures)
    grid = pictures.size // vae.config.stride
    shape = (len(pictures.labels), 2, vae.config.channels, grid, grid)
    with new_folder(out) as folder:
        arrays = [
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape) for name in ("mean", "logvar")
        ]
        for rows, side in every_picture(pictures, batch, say):
            parts = encode(vae, pictures, rows, np.full(len(rows), bool(side)))
            for array, part in zip(arrays, parts, strict=True):
                array[rows, side] = part.numpy()
        scale = latent_scale(*(array[pictures.train, 0] for array in arrays))
        write_labels(folder, pictures)
        notes = {"latent_scale": scale, "pictures": pictures.source.name, "vae_sha256": file_digest(vae_file)}
        write_json(folder / NOTES, notes)
    return scale


def open_cache(path: Path, vae_file: Path | None = None) -> LatentSet:
    """Open a folder that `write_cache` wrote; FarError if it is none, or was made with another VAE than `vae_file`."""
    notes, train = read_split(path, NOTES, "cache-latents")
    if vae_file is not None:
        check_vae(path, notes.get("vae_sha256"), vae_file)
    scale = notes.get("latent_scale")
    if not isinstance(scale, float) or not scale > 0:
        raise FarError(f"{path / NOTES}: latent_scale is {scale!r}; make it again with far train cache-latents")
    mean, log_variance = load_array(path / "mean.npy"), load_array(path / "logvar.npy")
    if mean.ndim != 5 or mean.shape[1] != 2 or mean.shape[3] != mean.shape[4] or mean.shape != log_variance.shape:
        raise FarError(
            f"{path}: mean {list(mean.shape)} and logvar {list(log_variance.shape)}; expected [N, 2, C, g, g] twice"
        )
    labels = load_labels(path / "labels.npy", len(mean))

    def moments(rows: NDArray[np.int64], flip: NDArray[np.bool_]) -> Moments:
        side = flip.astype(np.int64)
        return torch.from_numpy(np.array(mean[rows, side])), torch.from_numpy(np.array(log_variance[rows, side]))

    return LatentSet(path, mean.shape[2], mean.shape[3], scale, labels, read_names(path, labels), train, moments)
