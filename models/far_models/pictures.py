"""Picture sets (prepared arrays or folders of image files) and the order in which a training visits them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from far_runtime.errors import FarError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class PictureSet:
    """Square RGB pictures with class labels."""

    source: Path
    """The folder."""
    size: int
    """Side in pixels."""
    labels: NDArray[np.int64]
    """Class label of every picture [N]."""
    names: tuple[str, ...]
    """Class names by label."""
    train: NDArray[np.int64]
    """Row numbers of the pictures to train on."""
    held_out: NDArray[np.int64]
    """Row numbers of the pictures to evaluate on."""
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    """Reads rows [n] as uint8 [n, size, size, 3]."""

    def pixels(self, rows: NDArray[np.int64], flip: NDArray[np.bool_] | None = None) -> Tensor:
        """Pictures [n, 3, size, size] in [-1, 1] of rows [n], mirrored left to right where `flip` [n] is set."""
        pictures = self.read(rows)
        if flip is not None:
            pictures = np.where(flip[:, None, None, None], pictures[:, :, ::-1], pictures)
        return normalised(pictures)


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """Pictures [n, 3, H, W] in [-1, 1] of uint8 [n, H, W, 3]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def open_pictures(path: Path, size: int = 64) -> PictureSet:
    """Open images.npy [N, S, S, 3] and labels.npy [N] (as scripts/zoo/prepare_emoji.py writes), or an image folder.

    An image folder has one subfolder per class; its pictures are cropped to the middle square and resized to `size`.
    Raises FarError for a missing or empty folder and for arrays of another shape.
    """
    if not path.is_dir():
        raise FarError(
            f"{path}: no such folder; expected images.npy and labels.npy, or one subfolder of pictures per class "
            "(--data)"
        )
    if (path / "images.npy").is_file():
        return _open_arrays(path)
    return _open_image_folder(path, size)


def load_array(path: Path) -> NDArray[np.generic]:
    """A memory-mapped .npy file; FarError where it is missing or another kind of file."""
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise FarError(
            f"{path}: no such file; prepare the data again (scripts/zoo/prepare_emoji.py or far train cache-latents)"
        ) from error
    except OSError as error:
        raise FarError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise FarError(f"{path}: not a .npy array, or cut short; prepare the data again") from error
    return array


def load_labels(path: Path, count: int) -> NDArray[np.int64]:
    """Labels [count] from a .npy file; FarError for another shape or type."""
    labels = load_array(path)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise FarError(
            f"{path}: {labels.dtype} {list(labels.shape)}; expected whole numbers [{count}], one per picture"
        )
    return np.asarray(labels, dtype=np.int64)


def _open_arrays(path: Path) -> PictureSet:
    images = load_array(path / "images.npy")
    if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] != images.shape[2] or images.dtype != np.uint8:
        raise FarError(f"{path / 'images.npy'}: {images.dtype} {list(images.shape)}; expected uint8 [N, size, size, 3]")
    labels = load_labels(path / "labels.npy", len(images))
    names = read_names(path, labels)
    rows = np.arange(len(images))
    train, held_out = rows, rows[:0]
    if (path / "split.json").is_file():
        split = json.loads((path / "split.json").read_text(encoding="utf-8"))
        train, held_out = (np.asarray(split[part], dtype=np.int64) for part in ("train", "held_out"))
    if not len(train):
        raise FarError(f"{path}: no pictures to train on")

    def read(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.asarray(images[rows], dtype=np.uint8)

    return PictureSet(
        source=path,
        size=images.shape[1],
        labels=labels,
        names=names,
        train=train,
        held_out=held_out,
        read=read,
    )


def read_names(path: Path, labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Class names of names.json, or the numbers as names; FarError where a label has no name."""
    classes = int(labels.max()) + 1 if len(labels) else 0
    if not (path / "names.json").is_file():
        return tuple(str(i) for i in range(classes))
    names = tuple(json.loads((path / "names.json").read_text(encoding="utf-8")))
    if len(names) < classes or (len(labels) and labels.min() < 0):
        raise FarError(
            f"{path / 'names.json'}: {len(names)} names, but labels run from {labels.min()} to {classes - 1}; "
            "expected a name per label"
        )
    return names


def _open_image_folder(path: Path, size: int) -> PictureSet:
    names = tuple(sorted(child.name for child in path.iterdir() if child.is_dir()))
    files: list[str] = []
    counts = []
    for name in names:
        class_files = sorted(picture_files(path / name))
        files += [f"{name}/{file}" for file in class_files]
        counts.append(len(class_files))
    if not files:
        raise FarError(
            f"{path}: no pictures; expected images.npy and labels.npy, or one subfolder of .png, .jpg or .webp files "
            "per class"
        )

    def read(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return read_pictures([path / files[row] for row in rows], size)

    rows = np.arange(len(files))
    return PictureSet(
        source=path,
        size=size,
        labels=np.repeat(np.arange(len(names)), counts),
        names=names,
        train=rows,
        held_out=rows[:0],
        read=read,
    )


def picture_files(folder: Path) -> Iterator[str]:
    """Paths of the picture files in a folder and its subfolders, relative to the folder."""
    # Strings, not Path objects: there may be millions.
    for subfolder, folders, files in os.walk(folder):
        folders.sort()
        relative = os.path.relpath(subfolder, folder)
        prefix = "" if relative == "." else f"{relative}/"
        yield from (f"{prefix}{file}" for file in files if os.path.splitext(file)[1].lower() in SUFFIXES)


def read_pictures(paths: Sequence[Path], size: int) -> NDArray[np.uint8]:
    """The middle squares uint8 [n, size, size, 3] of picture files, decoded by several threads."""
    return np.stack(list(decoder_threads().map(lambda path: read_picture(path, size), paths)))


@lru_cache(maxsize=1)
def decoder_threads() -> ThreadPoolExecutor:
    """Threads that decode pictures; Pillow releases Python's lock while it decodes."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "pictures")


def read_picture(path: Path, size: int) -> NDArray[np.uint8]:
    """The middle square of a picture file, resized to uint8 [size, size, 3]; transparency becomes white."""
    try:
        with Image.open(path) as picture:
            has_alpha = "transparency" in picture.info or picture.mode.upper().endswith("A")
            flat = picture.convert("RGBA" if has_alpha else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise FarError(f"{path}: cannot be read as a picture ({error}); remove or replace it") from error
    if flat.mode == "RGBA":
        flat = Image.alpha_composite(Image.new("RGBA", flat.size, "white"), flat).convert("RGB")
    side = min(flat.size)
    left, top = (flat.width - side) // 2, (flat.height - side) // 2
    square = flat.resize(
        (size, size),
        Image.Resampling.BOX if side >= 2 * size else Image.Resampling.BICUBIC,
        (left, top, left + side, top + side),
    )
    return np.asarray(square, dtype=np.uint8)


def visiting_order(step: int, batch: int, count: int, seed: int) -> NDArray[np.int64]:
    """Rows [batch], below `count`, that a training step (from 0) visits: one shuffled pass through the data after the
    other.

    The rows depend on the arguments alone, so that a resumed training goes on exactly where it was.
    """
    positions = np.arange(step * batch, (step + 1) * batch)
    rows = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(positions // count):
        in_epoch = positions // count == epoch
        rows[in_epoch] = shuffled(count, seed, int(epoch))[positions[in_epoch] % count]
    return rows


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the rows [count] in one pass through the data; cached, since every step of the pass needs it."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def mixed_rows(
    step: int, batch: int, counts: Sequence[int], shares: Sequence[float], seed: int
) -> list[NDArray[np.int64]]:
    """Rows that a step visits in each of several sets.

    counts: rows of each set. shares: the part of the batch from each set; the first set takes what the others leave.
    """
    others = [round(batch * share) for share in shares[1:]]
    parts = [batch - sum(others), *others]
    return [
        visiting_order(step, part, count, seed + i) for i, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]
