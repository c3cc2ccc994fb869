"""Drawing many pictures so that a run that is ended goes on: they are addressed by their seeds, and kept batch by
batch."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from far_export.evaluate.features import Extractor, Found
from far_runtime.images.writing import save_plain
from far_runtime.progress import Reporting, silent
from far_runtime.storage.atomic import whole_file
from far_runtime.storage.run_record import claim

RUN = "run.json"
Pixels = NDArray[np.uint8]
Draw = Callable[[range], Pixels]
"""Pictures uint8 [n, H, W, 3] by their numbers in the run."""


@dataclass(frozen=True)
class Run:
    """A folder of `count` pictures that are drawn `batch` at a time.

    facts: all that a picture depends on beside its number. files: where the pictures are written as PNG, if at all.
    network: whose features of them are kept, if any's.
    """

    folder: Path
    facts: Mapping[str, Any]
    count: int
    batch: int
    files: Sequence[Path] | None = None
    network: Extractor | None = None

    def begin(self) -> None:
        """Write down what is drawn; FarError where the folder holds a run of something else."""
        claim(self.folder / RUN, self.facts)

    def drawn(self, draw: Draw, reporting: Reporting = silent) -> Found | None:
        """What the network says of all pictures (None without one); those that are missing are drawn."""
        gathered = self._kept()
        left = self._missing(gathered)
        done = self.count - sum(map(len, left))
        title = f"pictures (going on: {done} are there)" if done else "pictures"
        with reporting(title, self.count) as report:
            for numbers in left:
                pictures = self._written(numbers)
                if pictures is None:
                    pictures = draw(numbers)
                    if self.files is not None:
                        write_pictures(pictures, self.files[numbers.start : numbers.stop])
                if self.network is not None and not gathered.has(numbers):
                    found = self.network(pictures)
                    self._keep(numbers, found)
                    gathered.put(numbers, found)
                done += len(numbers)
                report(done)
        return gathered.found if self.network else None

    def _missing(self, gathered: Gathered) -> list[range]:
        """Batches that lack a file, or features where they are wanted."""
        batches = (range(i, min(i + self.batch, self.count)) for i in range(0, self.count, self.batch))
        return [
            numbers
            for numbers in batches
            if (self.network and not gathered.has(numbers))
            or (self.files and not all(self.files[i].exists() for i in numbers))
        ]

    def _written(self, numbers: range) -> Pixels | None:
        """Pictures that were written before; None where any is missing or damaged."""
        if self.files is None:
            return None
        try:
            return np.stack([read_picture(self.files[i]) for i in numbers])
        except (OSError, ValueError):
            return None

    @property
    def _features(self) -> Path:
        return self.folder / "features" / (self.network.digest if self.network else "")

    def _kept(self) -> Gathered:
        """Features that were kept, whatever the batches were; damaged files are passed over."""
        gathered = Gathered(self.count)
        for path in sorted(self._features.glob("*.npz")) if self.network else ():
            place = re.fullmatch(r"(\d+)-(\d+)\.npz", path.name)
            if place is None:
                continue
            numbers = range(int(place[1]), int(place[2]) + 1)
            try:
                with np.load(path, allow_pickle=False) as file:
                    found = Found(file["features"], file["probabilities"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue
            if len(found) == len(found.probabilities) == len(numbers) and np.isfinite(found.features).all():
                gathered.put(numbers, found)
        return gathered

    def _keep(self, numbers: range, found: Found) -> None:
        path = self._features / f"{numbers.start:06d}-{numbers.stop - 1:06d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as aside, aside.open("wb") as file:
            np.savez(file, features=found.features, probabilities=found.probabilities)


class Gathered:
    """What a network says of `count` pictures, as it comes."""

    def __init__(self, count: int) -> None:
        self._there = np.zeros(count, dtype=bool)
        self._arrays: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def has(self, numbers: range) -> bool:
        """Whether all of these pictures are there."""
        return bool(self._there[numbers.start : numbers.stop].all())

    def put(self, numbers: range, found: Found) -> None:
        """Add pictures; those behind the last are passed over."""
        count = len(self._there)
        sides = (found.features, found.probabilities)
        if self._arrays is None:
            features, probabilities = (np.zeros((count, side.shape[1]), np.float32) for side in sides)
            self._arrays = features, probabilities
        inside = max(min(numbers.stop, count) - numbers.start, 0)
        for array, side in zip(self._arrays, sides, strict=True):
            array[numbers.start : numbers.start + inside] = side[:inside]
        self._there[numbers.start : numbers.start + inside] = True

    @property
    def found(self) -> Found:
        """All of it, when all pictures are there."""
        assert self._arrays is not None and self._there.all()
        return Found(*self._arrays)


def write_pictures(pictures: Pixels, paths: Sequence[Path]) -> None:
    """Write pictures uint8 [n, H, W, 3] as PNG, each whole or not at all."""
    for picture, path in zip(pictures, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plain(path, Image.fromarray(picture))


def read_picture(path: Path) -> Pixels:
    """A picture uint8 [H, W, 3] as it was written."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)
