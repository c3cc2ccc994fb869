"""What pictures are compared with: a folder of pictures, or the statistics that others have published."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from far_export.distribution import FeatureCache
from far_export.evaluate.metrics import MOST_REFERENCES, Statistics, statistics_of
from far_export.evaluate.networks import Extractor
from far_runtime.errors import FarError
from far_runtime.files import user_cache

if TYPE_CHECKING:
    from far_models.training.data import PictureSet

PARTS = ("train", "held_out", "all")
READ = 256
Read = Callable[[NDArray[np.int64]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Reference:
    """A reference for Frechet distances. features [N, D]: of its pictures, up to 10,000 of them evenly spread where it
    has more; None where only statistics are known. read, count: its pictures, for a floor. digest: of its content."""

    name: str
    count: int | None
    digest: str
    statistics: Statistics
    features: NDArray[np.float32] | None
    read: Read | None = None


def open_reference(text: str, size: int, network: Extractor, say: Callable[[str], None]) -> Reference:
    """A reference from PATH or FOLDER:PART (train, held_out or all, of a folder with split.json).

    PATH: a folder (images.npy and labels.npy, a subfolder of pictures per class, or pictures; cut to their middle
    square and resized to `size`), or .npz statistics: mu and sigma, and pictures arr_0 where there are. Features of
    pictures are kept in the user's cache. FarError for anything else, and for statistics of another network.
    """
    path, part = split_part(text)
    if path.is_dir():
        return _of_folder(path, part, size, network, say)
    if not path.is_file():
        raise FarError(f"--reference {path}: no such file or folder; give a folder of pictures or .npz statistics")
    if part:
        raise FarError(f"--reference {text}: only a folder has parts; leave out :{part}")
    return _of_statistics(path, network, say)


def split_part(text: str) -> tuple[Path, str]:
    """The path and the part of FOLDER:PART; "" where none is named."""
    before, colon, after = text.rpartition(":")
    return (Path(before), after) if colon and after in PARTS else (Path(text), "")


def _of_folder(path: Path, part: str, size: int, network: Extractor, say: Callable[[str], None]) -> Reference:
    pictures = _pictures(path, size)
    rows = {"train": pictures.train, "held_out": pictures.held_out, "all": np.arange(len(pictures.labels))}
    chosen = rows[part or ("train" if len(pictures.held_out) else "all")]
    name = f"{path.name}:{part or 'train'}" if len(pictures.held_out) else path.name
    if len(chosen) < 2:
        raise FarError(f"--reference {path}:{part}: {len(chosen)} pictures; expected 2 or more; choose another part")
    say(f"{name}: {len(chosen)} pictures")

    def read(places: NDArray[np.int64]) -> NDArray[np.uint8]:
        return pictures.read(chosen[places])

    digest, features = features_of(read, len(chosen), network, say)
    return Reference(name, len(chosen), digest, statistics_of(features), evenly_spread(features), read)


def _pictures(path: Path, size: int) -> PictureSet:
    from far_models.training.data import PICTURES, PictureSet, open_pictures, read_pictures

    files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
    if (path / "images.npy").is_file() or not files:
        return open_pictures(path, size)

    def read(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return read_pictures([files[row] for row in rows], size)

    everything = np.arange(len(files))
    return PictureSet(path, size, np.zeros(len(files), np.int64), ("",), everything, everything[:0], read)


def features_of(
    read: Read, count: int, network: Extractor, say: Callable[[str], None]
) -> tuple[str, NDArray[np.float32]]:
    """SHA-256 of pictures and their features [count, D], which are kept in the user's cache."""
    digest = hashlib.sha256()
    for pictures in _blocks(read, count):
        digest.update(f"{pictures.shape}".encode())
        digest.update(pictures.tobytes())
    cache = FeatureCache(user_cache() / "features", {"pictures": digest.hexdigest(), "network": network.digest})
    seeds = range(count)
    kept = cache.find(seeds)
    if kept is None:
        found = []
        for pictures in _blocks(read, count):
            found.append(network(pictures).features)
            say(f"  features of {sum(map(len, found))} of {count} pictures")
        cache.keep(seeds, np.concatenate(found).astype(np.float64))
        kept = np.concatenate(found).astype(np.float64)
    return digest.hexdigest(), kept.astype(np.float32)


def _blocks(read: Read, count: int) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, count, READ):
        yield read(np.arange(start, min(start + READ, count)))


def evenly_spread(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most MOST_REFERENCES rows."""
    count = min(len(features), MOST_REFERENCES)
    return features[np.linspace(0, len(features) - 1, count).round().astype(np.int64)]


def _of_statistics(path: Path, network: Extractor, say: Callable[[str], None]) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                raise FarError(
                    f"--reference {path}: has {', '.join(file.files) or 'nothing'}; expected mu and sigma, as in "
                    "adm_in256_stats.npz"
                )
            mean, covariance = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
            images = file["arr_0"] if "arr_0" in file.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FarError(f"--reference {path}: not a readable .npz file ({error}); fetch it again") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise FarError(
            f"--reference {path}: mu {list(mean.shape)}, sigma {list(covariance.shape)}; expected [D] and [D, D]"
        )
    if len(mean) != network.width:
        other = "leave out --inception" if network.inception else "give the Inception they were made with: --inception"
        raise FarError(
            f"--reference {path}: statistics of {len(mean)} features; {network.name} has {network.width}; {other}"
        )
    digest = hashlib.sha256(mean.tobytes() + covariance.tobytes())
    if images is None:
        return Reference(path.name, None, digest.hexdigest(), Statistics(mean, covariance), None)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise FarError(f"--reference {path}: arr_0 is {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, 3]")
    say(f"{path.name}: {len(images)} pictures for precision and recall")
    _, features = features_of(lambda rows: images[rows], len(images), network, say)
    statistics = Statistics(mean, covariance)
    return Reference(path.name, len(images), digest.hexdigest(), statistics, evenly_spread(features))
