"""Folders of what frozen networks make of pictures or texts once, so that a run need not compute it again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_models.pictures import PictureSet
from far_runtime.errors import FarError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place when all went well; FarError where `out` exists."""
    if out.exists():
        raise FarError(f"{out}: exists already; remove it or choose another -o folder")
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        os.replace(staging, out)
    except OSError as error:
        raise FarError(
            f"{out}: cannot be written ({error.strerror}); free some space or choose another -o folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_labels(folder: Path, pictures: PictureSet) -> None:
    """labels.npy, names.json and split.json, as in a picture folder."""
    np.save(folder / "labels.npy", pictures.labels)
    write_json(folder / "names.json", list(pictures.names))
    write_json(folder / "split.json", {"train": pictures.train.tolist(), "held_out": pictures.held_out.tolist()})


def read_split(path: Path, notes: str, command: str) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """The notes (a JSON file) and the rows to train on of a cache folder; FarError where it is none."""
    try:
        found = json.loads((path / notes).read_text(encoding="utf-8"))
        split = json.loads((path / "split.json").read_text(encoding="utf-8"))
        return dict(found), np.asarray(split["train"], dtype=np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FarError(f"{path}: lacks a readable {notes} or split.json; make it with far train {command}") from error


def write_json(path: Path, value: object) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def check_vae(path: Path, digest: object, vae_file: Path) -> None:
    """FarError unless the cache was made with this VAE."""
    if file_digest(vae_file) != digest:
        raise FarError(f"{path}: made with another VAE than {vae_file}; make it again with far train cache-latents")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
