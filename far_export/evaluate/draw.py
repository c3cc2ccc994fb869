"""Drawing many pictures so that a run that is ended goes on: they are addressed by their seeds, and kept in parts."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from far_export.evaluate.networks import Extractor, Found
from far_runtime.errors import FarError
from far_runtime.files import whole_file
from far_runtime.pictures import save_plain

RUN = "run.json"
PART = 64
"""Pictures of a part: what a run that is killed loses at most."""

Draw = Callable[[Sequence[int]], NDArray[np.uint8]]
"""Pictures uint8 [n, H, W, 3] by their numbers in the run."""


@dataclass(frozen=True)
class Run:
    """A folder of what was drawn. facts: all that the pictures and their features depend on."""

    folder: Path
    facts: Mapping[str, Any]

    def begin(self) -> None:
        """Write down what is drawn; FarError where the folder holds a run of something else."""
        path = self.folder / RUN
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as aside:
                aside.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
            return
        except (OSError, ValueError) as error:
            raise FarError(f"{path}: cannot be read ({error}); remove {self.folder} or choose another -o") from error
        now = json.loads(json.dumps(self.facts))
        changed = [
            f"{key} {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise FarError(
                f"{self.folder}: holds pictures of another run ({'; '.join(changed)}); give the same settings or "
                "choose another -o folder"
            )

    def drawn(
        self,
        count: int,
        draw: Draw,
        network: Extractor | None,
        report: Callable[[int, int], None],
        file_of: Callable[[int], Path] | None = None,
    ) -> Found | None:
        """What the network says of the pictures 0 .. count - 1 (None without a network); draws those that are missing.

        file_of: where picture i is written as PNG, if at all. report: is told how many are done, and of how many.
        """
        parts: list[Found] = []
        for numbers in parts_of(count):
            found = self._kept(numbers) if network else None
            if not self._whole(numbers, file_of) or (network and found is None):
                pictures = draw(numbers)
                if file_of is not None:
                    write_pictures(pictures, [file_of(i) for i in numbers])
                if network and found is None:
                    found = network(pictures)
                    self._keep(numbers, found)
            if found is not None:
                parts.append(found)
            report(numbers.stop, count)
        if not parts:
            return None
        features, probabilities = zip(*((part.features, part.probabilities) for part in parts), strict=True)
        return Found(np.concatenate(features), np.concatenate(probabilities))

    def missing(self, count: int, features: bool, file_of: Callable[[int], Path] | None = None) -> int:
        """How many of the first `count` pictures are still to be drawn."""
        left = (
            numbers
            for numbers in parts_of(count)
            if not self._whole(numbers, file_of) or (features and not self._path(numbers).exists())
        )
        return sum(map(len, left))

    @staticmethod
    def _whole(numbers: range, file_of: Callable[[int], Path] | None) -> bool:
        return file_of is None or all(file_of(i).exists() for i in numbers)

    def _path(self, numbers: range) -> Path:
        return self.folder / "features" / f"{numbers.start:06d}-{numbers.stop - 1:06d}.npz"

    def _kept(self, numbers: range) -> Found | None:
        try:
            with np.load(self._path(numbers), allow_pickle=False) as file:
                found = Found(file["features"], file["probabilities"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return found if len(found) == len(numbers) and np.isfinite(found.features).all() else None

    def _keep(self, numbers: range, found: Found) -> None:
        path = self._path(numbers)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as aside, aside.open("wb") as file:
            np.savez(file, features=found.features, probabilities=found.probabilities)


def parts_of(count: int) -> Iterator[range]:
    """The numbers 0 .. count - 1 in parts."""
    return (range(start, min(start + PART, count)) for start in range(0, count, PART))


def write_pictures(pictures: NDArray[np.uint8], paths: Sequence[Path]) -> None:
    """Write pictures uint8 [n, H, W, 3] as PNG, each whole or not at all."""
    for picture, path in zip(pictures, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plain(path, Image.fromarray(picture))
