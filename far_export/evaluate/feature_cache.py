"""Features that were computed before, kept in the user's cache folder."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.errors import FarError
from far_runtime.storage.atomic import whole_file
from far_runtime.storage.run_record import digest_of


class FeatureCache:
    """Features of sets of pictures, by everything that they depend on, in the user's cache folder."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """facts: what was drawn, by what: weights, settings, subjects, library versions."""
        self._folder, self._facts = folder, dict(facts)

    def find(self, seeds: Sequence[int]) -> NDArray[np.float64] | None:
        """The features that were kept for these seeds; None where there are none, or their file is damaged."""
        try:
            with np.load(self._path(seeds), allow_pickle=False) as file:
                found: NDArray[np.float64] = file["features"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return found if found.shape[0] == len(seeds) and np.isfinite(found).all() else None

    def keep(self, seeds: Sequence[int], found: NDArray[np.float64]) -> None:
        """Keep features for the next time; a folder that cannot be written is no error."""
        path = self._path(seeds)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as aside, aside.open("wb") as file:
                np.savez(file, features=found)
        except (OSError, FarError):
            return

    def _path(self, seeds: Sequence[int]) -> Path:
        facts = {**self._facts, "seeds": [int(seed) for seed in seeds]}
        return self._folder / f"{digest_of(facts, digits=24)}.npz"
