"""Latents as training data for FAR: encoded on the fly, or read from a cache of moments."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.kl_vae import AutoencoderKL
from far_models.training.data import PictureSet, load_array, load_labels, read_names
from far_runtime.errors import FarError

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LatentSet:
    """Moments of pictures and of their mirror images: moments(rows [n], flip [n]) -> mean, log variance [n, C, g, g].

    `scale` is 1 / standard deviation of the latents, by which FAR's are multiplied; `train` are the rows to train on.
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
    check_fit(vae, pictures)
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


def check_fit(vae: AutoencoderKL, pictures: PictureSet) -> None:
    """FarError unless the VAE's stride divides the pictures' side."""
    if pictures.size % vae.config.stride:
        raise FarError(
            f"{pictures.source}: pictures of {pictures.size} pixels do not fit a VAE of stride {vae.config.stride}; "
            "use --size"
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def write_cache(
    vae: AutoencoderKL, vae_file: Path, pictures: PictureSet, out: Path, batch: int, say: Callable[[str], None]
) -> float:
    """Write the moments of all pictures, plain and mirrored, as memory-mappable arrays; returns the latent scale.

    The folder holds mean.npy and logvar.npy [N, 2, C, g, g] (index 1: mirrored), labels.npy, names.json, split.json and
    latents.json, and appears whole. FarError if it exists already.
    """
    check_fit(vae, pictures)
    if out.exists():
        raise FarError(f"{out}: exists already; remove it or choose another -o folder")
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    grid = pictures.size // vae.config.stride
    shape = (len(pictures.labels), 2, vae.config.channels, grid, grid)
    try:
        staging.mkdir(parents=True)
        arrays = [
            np.lib.format.open_memmap(staging / f"{name}.npy", "w+", np.float32, shape) for name in ("mean", "logvar")
        ]
        for start in range(0, shape[0], batch):
            rows = np.arange(start, min(start + batch, shape[0]))
            for side in (0, 1):
                for array, part in zip(
                    arrays, encode(vae, pictures, rows, np.full(len(rows), bool(side))), strict=True
                ):
                    array[rows, side] = part.numpy()
            say(f"{rows[-1] + 1} of {shape[0]} pictures")
        scale = latent_scale(*(array[pictures.train, 0] for array in arrays))
        np.save(staging / "labels.npy", pictures.labels)
        notes = {
            "names.json": list(pictures.names),
            "split.json": {"train": pictures.train.tolist(), "held_out": pictures.held_out.tolist()},
            "latents.json": {
                "latent_scale": scale,
                "pictures": pictures.source.name,
                "vae_sha256": file_digest(vae_file),
            },
        }
        for name, value in notes.items():
            (staging / name).write_text(json.dumps(value), encoding="utf-8")
        os.replace(staging, out)
    except OSError as error:
        raise FarError(
            f"{out}: cannot be written ({error.strerror}); free some space or choose another -o folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return scale


def open_cache(path: Path, vae_file: Path | None = None) -> LatentSet:
    """Open a folder that `write_cache` wrote; FarError if it is none, or was made with another VAE than `vae_file`."""
    try:
        notes = json.loads((path / "latents.json").read_text(encoding="utf-8"))
        split = json.loads((path / "split.json").read_text(encoding="utf-8"))
        scale, digest = float(notes["latent_scale"]), notes["vae_sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise FarError(f"{path}: not a folder of cached latents; make one with far train cache-latents") from error
    if vae_file is not None and file_digest(vae_file) != digest:
        raise FarError(
            f"{path}: the latents were made with another VAE than {vae_file}; "
            "make them again with far train cache-latents"
        )
    mean, log_variance = load_array(path / "mean.npy"), load_array(path / "logvar.npy")
    if mean.ndim != 5 or mean.shape[1] != 2 or mean.shape[3] != mean.shape[4] or mean.shape != log_variance.shape:
        raise FarError(
            f"{path}: mean {list(mean.shape)} and logvar {list(log_variance.shape)}; expected [N, 2, C, g, g] twice"
        )
    labels = load_labels(path / "labels.npy", len(mean))

    def moments(rows: NDArray[np.int64], flip: NDArray[np.bool_]) -> Moments:
        side = flip.astype(np.int64)
        return torch.from_numpy(np.array(mean[rows, side])), torch.from_numpy(np.array(log_variance[rows, side]))

    train = np.asarray(split["train"], dtype=np.int64)
    return LatentSet(path, mean.shape[2], mean.shape[3], scale, labels, read_names(path, labels), train, moments)
