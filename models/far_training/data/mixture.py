"""Pictures of one or several sets, mixed into every batch, as training data for the autoencoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.pictures import PictureSet, mixed_rows
from far_runtime.errors import FarError, SettingName
from far_training.loop.randomness import SampleRng

MIRRORED = 0.5
"""Share of the pictures that are mirrored."""


@dataclass(frozen=True)
class PictureMixture:
    """Picture sets of one size and their shares of each batch; an epoch is a pass through the first set."""

    sets: Sequence[PictureSet]
    shares: Sequence[float]

    def grid(self, stride: int) -> int:
        """Side of the pictures' latents; FarError for sizes that do not fit each other or the stride."""
        size = self.sets[0].size
        if any(pictures.size != size for pictures in self.sets):
            raise FarError(
                f"pictures of {', '.join(str(p.size) for p in self.sets)} pixels cannot be mixed; prepare them at one "
                "size"
            )
        if size % stride:
            raise FarError(
                f"pictures of {size} pixels do not fit a VAE of stride {stride}; choose ",
                SettingName("multipliers"),
                " and ",
                SettingName("patch"),
                " so that it divides",
            )
        return size // stride

    @property
    def epoch_length(self) -> int:
        """Training pictures of the first set."""
        return len(self.sets[0].train)

    def rows(self, batch: int, rng: SampleRng) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The set [n] of each sample of a step with `batch` pictures, and its row [n] in that set."""
        lengths = [len(pictures.train) for pictures in self.sets]
        parts = mixed_rows(rng.step, batch, lengths, self.shares, rng.seed)
        rows = np.concatenate([pictures.train[part] for pictures, part in zip(self.sets, parts, strict=True)])
        source = np.repeat(np.arange(len(self.sets)), [len(part) for part in parts])
        return source[rng.places], rows[rng.places]

    def pictures(self, source: NDArray[np.int64], rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Tensor:
        """Pictures [n, 3, S, S] in [-1, 1] of these rows of these sets, some of them mirrored."""
        pixels = torch.empty(len(rows), 3, self.sets[0].size, self.sets[0].size)
        for number, pictures in enumerate(self.sets):
            inside = source == number
            if inside.any():
                pixels[torch.from_numpy(inside)] = pictures.pixels(rows[inside], mirrored[inside])
        return pixels
