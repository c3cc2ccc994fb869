"""All that is random in a training step, so that it does not depend on how the batch is shared out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

OF_STEP = 1 << 40
"""In the place of a sample's place: what all samples of a step share."""


class SampleRng:
    """Random numbers of some samples of a step's batch, each by its place (0 .. batch - 1) in the whole batch.

    One process that takes the whole batch, several that share it and micro-batches that follow each other draw the same
    numbers for the same sample, and a resumed run draws those of a straight one.
    """

    def __init__(self, seed: int, step: int, places: Sequence[int]) -> None:
        self.seed, self.step = seed, step
        self.places = np.asarray(places, dtype=np.int64)
        self._own = [torch.Generator().manual_seed(step_seed(seed, step, int(place))) for place in self.places]
        self.of_step = np.random.default_rng(step_seed(seed, step, OF_STEP))
        """What is the same for all samples, in every process; draw in a fixed order."""

    def __len__(self) -> int:
        return len(self.places)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers [n, *shape]."""
        return torch.stack([torch.randn(shape, generator=own) for own in self._own])

    def uniform(self, *shape: int) -> Tensor:
        """Numbers [n, *shape] from 0 to 1, exclusive."""
        return torch.stack([torch.rand(shape, generator=own) for own in self._own])

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers [n, *shape] from 0 to high, exclusive."""
        return torch.stack([torch.randint(high, shape, generator=own) for own in self._own])

    def happens(self, share: float) -> Tensor:
        """True [n] for a share of the samples."""
        return self.uniform() < share


def step_seed(seed: int, step: int, place: int) -> int:
    """A seed made of (run seed, step, place)."""
    return int(np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0] >> 1)
