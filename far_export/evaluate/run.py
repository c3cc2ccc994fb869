"""Drawing many pictures in a run that goes on where it was stopped: pictures are addressed by number, and their
features are kept batch by batch."""

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

from far_export.evaluate.features import ExtractedFeatures, FeatureExtractor
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
    """A folder of pictures that are drawn batch by batch."""

    folder: Path
    """Where the run's record and the features are kept."""

    facts: Mapping[str, Any]
    """All that a picture depends on, except its number."""

    count: int
    """Number of pictures."""

    batch: int
    """Pictures that are drawn together."""

    files: Sequence[Path] | None = None
    """Where the pictures are written as PNG, None where they are not kept."""

    network: FeatureExtractor | None = None
    """The network whose features are kept, None where none are needed."""

    def begin(self) -> None:
        """Write down what is drawn; FarError where the folder holds a run of something else."""
        claim(self.folder / RUN, self.facts)

    def complete(self, draw: Draw, reporting: Reporting = silent) -> ExtractedFeatures | None:
        """Draw the pictures that are missing; returns the features of all pictures, None without a network."""
        table = self._kept()
        missing = self._missing(table)
        done = self.count - sum(map(len, missing))
        title = f"pictures (going on: {done} are there)" if done else "pictures"
        with reporting(title, self.count) as report:
            for numbers in missing:
                pictures = self._written(numbers)
                if pictures is None:
                    pictures = draw(numbers)
                    if self.files is not None:
                        write_pictures(pictures, self.files[numbers.start : numbers.stop])
                if self.network is not None and not table.has(numbers):
                    features = self.network(pictures)
                    self._keep(numbers, features)
                    table.put(numbers, features)
                done += len(numbers)
                report(done)
        return table.all() if self.network else None

    def _missing(self, table: FeatureTable) -> list[range]:
        """Batches that lack a file, or features where there is a network."""
        batches = (range(i, min(i + self.batch, self.count)) for i in range(0, self.count, self.batch))
        return [
            numbers
            for numbers in batches
            if (self.network and not table.has(numbers))
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
    def _features_folder(self) -> Path:
        return self.folder / "features" / (self.network.digest if self.network else "")

    def _kept(self) -> FeatureTable:
        """Features that were kept, whatever the batches were; damaged files are ignored."""
        table = FeatureTable(self.count)
        for path in sorted(self._features_folder.glob("*.npz")) if self.network else ():
            name = re.fullmatch(r"(\d+)-(\d+)\.npz", path.name)
            if name is None:
                continue
            numbers = range(int(name[1]), int(name[2]) + 1)
            try:
                with np.load(path, allow_pickle=False) as file:
                    kept = ExtractedFeatures(file["features"], file["probabilities"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue
            if len(kept) == len(kept.probabilities) == len(numbers) and np.isfinite(kept.features).all():
                table.put(numbers, kept)
        return table

    def _keep(self, numbers: range, features: ExtractedFeatures) -> None:
        path = self._features_folder / f"{numbers.start:06d}-{numbers.stop - 1:06d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as aside, aside.open("wb") as file:
            np.savez(file, features=features.features, probabilities=features.probabilities)


class FeatureTable:
    """The features of `count` pictures, filled batch by batch."""

    def __init__(self, count: int) -> None:
        self._filled = np.zeros(count, dtype=bool)
        self._arrays: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def has(self, numbers: range) -> bool:
        """Whether the features of all these pictures are there."""
        return bool(self._filled[numbers.start : numbers.stop].all())

    def put(self, numbers: range, batch: ExtractedFeatures) -> None:
        """Add the features of a batch; pictures behind the last one are ignored."""
        count = len(self._filled)
        columns = (batch.features, batch.probabilities)
        if self._arrays is None:
            features, probabilities = (np.zeros((count, column.shape[1]), np.float32) for column in columns)
            self._arrays = features, probabilities
        inside = max(min(numbers.stop, count) - numbers.start, 0)
        for array, column in zip(self._arrays, columns, strict=True):
            array[numbers.start : numbers.start + inside] = column[:inside]
        self._filled[numbers.start : numbers.start + inside] = True

    def all(self) -> ExtractedFeatures:
        """The features of all pictures, once they are there."""
        assert self._arrays is not None and self._filled.all()
        return ExtractedFeatures(*self._arrays)


def write_pictures(pictures: Pixels, paths: Sequence[Path]) -> None:
    """Write pictures uint8 [n, H, W, 3] as PNG, each whole or not at all."""
    for picture, path in zip(pictures, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plain(path, Image.fromarray(picture))


def read_picture(path: Path) -> Pixels:
    """A picture uint8 [H, W, 3] from a file."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)
