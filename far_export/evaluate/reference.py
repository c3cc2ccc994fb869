"""What pictures are compared with: a folder of pictures, or the statistics that others have published."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from far_export.evaluate.feature_cache import FeatureCache
from far_export.evaluate.features import FeatureExtractor
from far_export.evaluate.metrics import MAX_REFERENCE_PICTURES, Statistics, feature_statistics
from far_runtime.errors import FarError
from far_runtime.progress import Reporting, silent
from far_runtime.storage.atomic import user_cache

if TYPE_CHECKING:
    from far_models.pictures import PictureSet

PARTS = ("train", "held_out", "all")
READ_BATCH = 256
"""Number of pictures that are read at a time, and whose features are kept in one file."""

Pixels = NDArray[np.uint8]
ReadPictures = Callable[[NDArray[np.int64]], Pixels]
"""Pictures uint8 [n, H, W, 3] by their numbers [n]."""


@dataclass(frozen=True)
class Reference:
    """What drawn pictures are compared with."""

    name: str
    """The name of its folder, with ":" and the part where there are parts, or of its file."""

    count: int | None
    """Number of its pictures, None where only their statistics are known."""

    digest: str
    """SHA-256 of its content."""

    statistics: Statistics
    """Statistics of its features."""

    features: NDArray[np.float32] | None = None
    """[N, D] of its pictures, of evenly spaced ones where there are more than 10,000; None without pictures."""

    read: ReadPictures | None = None
    """Reads its pictures, None without pictures."""

    note: str = ""
    """What was not taken from it, and why."""


def open_reference(text: str, size: int, network: FeatureExtractor, reporting: Reporting = silent) -> Reference:
    """A reference from the text of --reference: a folder, FOLDER:PART, or an .npz file.

    A folder holds images.npy and labels.npy, or a subfolder of pictures per class, or pictures; they are cut to their
    middle square and resized to `size` pixels. PART is train, held_out or all, of a folder with split.json. An .npz
    file holds the statistics mu and sigma, or pictures arr_0, or both. Features of pictures are kept in the user's
    cache. FarError for anything else, and for statistics of another network's features.
    """
    path, part = split_part(text)
    if path.is_dir():
        return _from_folder(path, part, size, network, reporting)
    if not path.is_file():
        raise FarError(f"--reference {path}: no such file or folder; give a folder of pictures or .npz statistics")
    if part:
        raise FarError(f"--reference {text}: only a folder has parts; leave out :{part}")
    return _from_npz(path, network, reporting)


def split_part(text: str) -> tuple[Path, str]:
    """The path and the part of FOLDER:PART; "" where none is named."""
    before, colon, after = text.rpartition(":")
    return (Path(before), after) if colon and after in PARTS else (Path(text), "")


def _from_folder(path: Path, part: str, size: int, network: FeatureExtractor, reporting: Reporting) -> Reference:
    pictures = _pictures(path, size)
    rows = {"train": pictures.train, "held_out": pictures.held_out, "all": np.arange(len(pictures.labels))}
    split = len(pictures.held_out) > 0
    chosen = rows[part or ("train" if split else "all")]
    name = path.resolve().name + (f":{part or 'train'}" if split else "")
    if len(chosen) < 2:
        raise FarError(f"--reference {path}:{part}: {len(chosen)} pictures; expected 2 or more; choose another part")

    def read(numbers: NDArray[np.int64]) -> Pixels:
        return pictures.read(chosen[numbers])

    digest, features = cached_features(read, len(chosen), network, f"features of {name}", reporting)
    return Reference(
        name=name,
        count=len(chosen),
        digest=digest,
        statistics=feature_statistics(features),
        features=evenly_spaced(features),
        read=read,
    )


def _pictures(path: Path, size: int) -> PictureSet:
    from far_models.pictures import SUFFIXES, PictureSet, open_pictures, read_pictures

    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if (path / "images.npy").is_file() or not files:
        try:
            pictures = open_pictures(path, size)
            rows = np.concatenate([pictures.train, pictures.held_out])
        except (ValueError, LookupError, TypeError) as error:
            raise FarError(f'--reference {path}: split.json has no "train" and "held_out" rows ({error})') from error
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(pictures.labels):
            raise FarError(f"--reference {path}: split.json names pictures that images.npy does not have")
        return pictures

    def read(numbers: NDArray[np.int64]) -> Pixels:
        return read_pictures([files[number] for number in numbers], size)

    numbers = np.arange(len(files))
    return PictureSet(path, size, np.zeros(len(files), np.int64), ("",), numbers, numbers[:0], read)


def cached_features(
    read: ReadPictures,
    count: int,
    network: FeatureExtractor,
    title: str,
    reporting: Reporting = silent,
    transform: Callable[[Pixels], Pixels] | None = None,
    transform_digest: str = "",
) -> tuple[str, NDArray[np.float32]]:
    """SHA-256 of `count` pictures, and their features [count, D], or those of what `transform` makes of them.

    Features are kept in the user's cache batch by batch, so that a run that was stopped goes on where it was.
    `transform_digest` names the transform in the cache.
    """
    whole, batches = hashlib.sha256(), []
    with reporting(title, count) as report:
        for start in range(0, count, READ_BATCH):
            pictures = read(np.arange(start, min(start + READ_BATCH, count)))
            digest = hashlib.sha256(f"{pictures.shape}".encode() + pictures.tobytes()).hexdigest()
            whole.update(digest.encode())
            facts = {"pictures": digest, "network": network.digest, "changed_by": transform_digest}
            cache = FeatureCache(user_cache() / "features", facts)
            kept = cache.find(range(len(pictures)))
            if kept is None:
                kept = network(transform(pictures) if transform else pictures).features.astype(np.float64)
                cache.keep(range(len(pictures)), kept)
            batches.append(kept.astype(np.float32))
            report(start + len(pictures))
    return whole.hexdigest(), np.concatenate(batches)


def evenly_spaced(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """All rows, or MAX_REFERENCE_PICTURES evenly spaced ones where there are more."""
    count = min(len(features), MAX_REFERENCE_PICTURES)
    return features[np.linspace(0, len(features) - 1, count).round().astype(np.int64)]


def _from_npz(path: Path, network: FeatureExtractor, reporting: Reporting) -> Reference:
    """From mu and sigma; from the pictures arr_0 where there are no statistics, or those of another network."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            statistics = _statistics(path, file) if {"mu", "sigma"} <= names else None
            images = _images(path, file["arr_0"]) if "arr_0" in names else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FarError(f"--reference {path}: not a readable .npz file ({error}); fetch it again") from error
    if statistics is None and images is None:
        raise FarError(
            f"--reference {path}: has {', '.join(sorted(names)) or 'nothing'}; expected mu and sigma, as in "
            "adm_in256_stats.npz, or pictures arr_0"
        )
    note = ""
    if statistics is not None and len(statistics.mean) != network.width:
        width = len(statistics.mean)
        if images is None:
            other = "leave out --inception" if network.inception else "give the network they are of: --inception FILE"
            raise FarError(
                f"--reference {path}: statistics of {width} features; {network.name} has {network.width}; {other}"
            )
        statistics = None
        note = f"its statistics are of {width} features, {network.name} has {network.width}: its pictures' are taken"
    if images is None:
        assert statistics is not None
        digest = hashlib.sha256(statistics.mean.tobytes() + statistics.covariance.tobytes())
        return Reference(path.name, None, digest.hexdigest(), statistics)

    def read(numbers: NDArray[np.int64]) -> Pixels:
        return images[numbers]

    pictures_digest, features = cached_features(read, len(images), network, f"features of {path.name}", reporting)
    return Reference(
        name=path.name,
        count=len(images),
        digest=pictures_digest,
        statistics=statistics or feature_statistics(features),
        features=evenly_spaced(features),
        read=read,
        note=note,
    )


def _statistics(path: Path, file: Any) -> Statistics:
    mean, covariance = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise FarError(
            f"--reference {path}: mu {list(mean.shape)}, sigma {list(covariance.shape)}; expected [D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise FarError(f"--reference {path}: mu or sigma has numbers that are not finite; fetch it again")
    return Statistics(mean, covariance)


def _images(path: Path, images: NDArray[Any]) -> Pixels:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) < 2:
        raise FarError(
            f"--reference {path}: arr_0 is {images.dtype} {list(images.shape)}; expected two or more pictures, uint8 "
            "[N, H, W, 3]"
        )
    return images
