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
from far_export.evaluate.features import Extractor
from far_export.evaluate.metrics import MOST_REFERENCES, Statistics, statistics_of
from far_runtime.errors import FarError
from far_runtime.progress import Reporting, silent
from far_runtime.storage.atomic import user_cache

if TYPE_CHECKING:
    from far_models.pictures import PictureSet

PARTS = ("train", "held_out", "all")
READ = 256
"""Pictures that are read, and whose features are kept, together."""

Pixels = NDArray[np.uint8]
Read = Callable[[NDArray[np.int64]], Pixels]


@dataclass(frozen=True)
class Reference:
    """A reference for Frechet distances. features [N, D]: of its pictures, up to 10,000 of them evenly spread where it
    has more; None where only statistics are known. read, count: its pictures, where it has any. digest: of its content.
    note: what was not taken from it."""

    name: str
    count: int | None
    digest: str
    statistics: Statistics
    features: NDArray[np.float32] | None = None
    read: Read | None = None
    note: str = ""


def open_reference(text: str, size: int, network: Extractor, reporting: Reporting = silent) -> Reference:
    """A reference from PATH or FOLDER:PART (train, held_out or all, of a folder with split.json).

    PATH: a folder (images.npy and labels.npy, a subfolder of pictures per class, or pictures; cut to their middle
    square and resized to `size`), or .npz statistics: mu and sigma, pictures arr_0, or both. Features of pictures are
    kept in the user's cache. FarError for anything else, and for statistics of another network.
    """
    path, part = split_part(text)
    if path.is_dir():
        return _of_folder(path, part, size, network, reporting)
    if not path.is_file():
        raise FarError(f"--reference {path}: no such file or folder; give a folder of pictures or .npz statistics")
    if part:
        raise FarError(f"--reference {text}: only a folder has parts; leave out :{part}")
    return _of_statistics(path, network, reporting)


def split_part(text: str) -> tuple[Path, str]:
    """The path and the part of FOLDER:PART; "" where none is named."""
    before, colon, after = text.rpartition(":")
    return (Path(before), after) if colon and after in PARTS else (Path(text), "")


def _of_folder(path: Path, part: str, size: int, network: Extractor, reporting: Reporting) -> Reference:
    pictures = _pictures(path, size)
    rows = {"train": pictures.train, "held_out": pictures.held_out, "all": np.arange(len(pictures.labels))}
    split = len(pictures.held_out) > 0
    chosen = rows[part or ("train" if split else "all")]
    name = path.resolve().name + (f":{part or 'train'}" if split else "")
    if len(chosen) < 2:
        raise FarError(f"--reference {path}:{part}: {len(chosen)} pictures; expected 2 or more; choose another part")

    def read(places: NDArray[np.int64]) -> Pixels:
        return pictures.read(chosen[places])

    digest, features = features_of(read, len(chosen), network, f"features of {name}", reporting)
    return Reference(name, len(chosen), digest, statistics_of(features), evenly_spread(features), read)


def _pictures(path: Path, size: int) -> PictureSet:
    from far_models.pictures import PICTURES, PictureSet, open_pictures, read_pictures

    files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
    if (path / "images.npy").is_file() or not files:
        try:
            found = open_pictures(path, size)
            rows = np.concatenate([found.train, found.held_out])
        except (ValueError, LookupError, TypeError) as error:
            raise FarError(f'--reference {path}: split.json has no "train" and "held_out" rows ({error})') from error
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(found.labels):
            raise FarError(f"--reference {path}: split.json names pictures that images.npy does not have")
        return found

    def read(rows: NDArray[np.int64]) -> Pixels:
        return read_pictures([files[row] for row in rows], size)

    everything = np.arange(len(files))
    return PictureSet(path, size, np.zeros(len(files), np.int64), ("",), everything, everything[:0], read)


def features_of(
    read: Read,
    count: int,
    network: Extractor,
    title: str,
    reporting: Reporting = silent,
    change: Callable[[Pixels], Pixels] | None = None,
    changed_by: str = "",
) -> tuple[str, NDArray[np.float32]]:
    """SHA-256 of `count` pictures, and the features [count, D] of what `change` (which `changed_by` tells from others)
    makes of them.

    They are kept in the user's cache block by block, so that a run that is ended goes on where it was.
    """
    whole, parts = hashlib.sha256(), []
    with reporting(title, count) as report:
        for start in range(0, count, READ):
            pictures = read(np.arange(start, min(start + READ, count)))
            digest = hashlib.sha256(f"{pictures.shape}".encode() + pictures.tobytes()).hexdigest()
            whole.update(digest.encode())
            facts = {"pictures": digest, "network": network.digest, "changed_by": changed_by}
            cache = FeatureCache(user_cache() / "features", facts)
            kept = cache.find(range(len(pictures)))
            if kept is None:
                kept = network(change(pictures) if change else pictures).features.astype(np.float64)
                cache.keep(range(len(pictures)), kept)
            parts.append(kept.astype(np.float32))
            report(start + len(pictures))
    return whole.hexdigest(), np.concatenate(parts)


def evenly_spread(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most MOST_REFERENCES rows."""
    count = min(len(features), MOST_REFERENCES)
    return features[np.linspace(0, len(features) - 1, count).round().astype(np.int64)]


def _of_statistics(path: Path, network: Extractor, reporting: Reporting) -> Reference:
    """Of mu and sigma; of the pictures arr_0 where there are no statistics, or of another network."""
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

    def read(places: NDArray[np.int64]) -> Pixels:
        return images[places]

    digest_of, features = features_of(read, len(images), network, f"features of {path.name}", reporting)
    statistics = statistics or statistics_of(features)
    return Reference(path.name, len(images), digest_of, statistics, evenly_spread(features), read, note)


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
