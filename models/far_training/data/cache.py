"""What the caches of latents, tokens and prompts share: labels, notes, and the check of the VAE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.pictures import PictureSet, normalised
from far_runtime.bundle import sha256_of
from far_runtime.errors import FarError


def write_labels(folder: Path, pictures: PictureSet) -> None:
    """Write labels.npy, names.json and split.json, as in a picture folder."""
    np.save(folder / "labels.npy", pictures.labels)
    write_json(folder / "names.json", list(pictures.names))
    write_json(folder / "split.json", {"train": pictures.train.tolist(), "held_out": pictures.held_out.tolist()})


def read_split(path: Path, notes: str, command: str) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """The notes (a JSON file) and the training rows of a cache folder that `far train COMMAND` wrote, else FarError."""
    try:
        values = json.loads((path / notes).read_text(encoding="utf-8"))
        split = json.loads((path / "split.json").read_text(encoding="utf-8"))
        return dict(values), np.asarray(split["train"], dtype=np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FarError(f"{path}: lacks a readable {notes} or split.json; make it with far train {command}") from error


def write_json(path: Path, value: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def check_vae(path: Path, digest: object, vae_file: Path) -> None:
    """FarError unless the SHA-256 `digest` in a cache's notes is that of this VAE."""
    if sha256_of(vae_file) != digest:
        raise FarError(f"{path}: made with another VAE than {vae_file}; make it again with far train cache-latents")


def encoded_both_ways(encode: Callable[[Tensor], Tensor], images: NDArray[np.uint8]) -> Tensor:
    """What `encode` makes of pictures uint8 [n, H, W, 3] and of their mirror images: [n, 2, ...], index 1: mirrored."""
    return torch.stack([encode(normalised(side)) for side in (images, images[:, :, ::-1])], dim=1)
