"""Random numbers of a training step that do not depend on how its batch is split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SHARED_PLACE = 1 << 40
"""Stands for the place of a sample in the seed of what all samples of a step share."""


class SampleRng:
    """Random numbers of the samples at some places (0 .. batch - 1) of a step's batch.

    A sample's numbers depend on the run's seed, the step and its place alone. So they are the same for one process that
    takes the whole batch, for several that share it, for micro-batches, and for a resumed run.
    """

    def __init__(self, seed: int, step: int, places: Sequence[int]) -> None:
        self.seed, self.step = seed, step
        self.places = np.asarray(places, dtype=np.int64)
        self._generators = [torch.Generator().manual_seed(step_seed(seed, step, int(place))) for place in self.places]
        self.shared = np.random.default_rng(step_seed(seed, step, SHARED_PLACE))
        """Numbers that all samples share, in every process; they are drawn in a fixed order."""

    def __len__(self) -> int:
        return len(self.places)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers [n, *shape]."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self._generators])

    def uniform(self, *shape: int) -> Tensor:
        """Numbers [n, *shape] from 0 to 1, exclusive."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self._generators])

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers [n, *shape] from 0 to high, exclusive."""
        return torch.stack([torch.randint(high, shape, generator=generator) for generator in self._generators])

    def bernoulli(self, share: float) -> Tensor:
        """Booleans [n] that are true with a probability of `share`."""
        return self.uniform() < share


def step_seed(seed: int, step: int, place: int) -> int:
    """A seed made of (run seed, step, place)."""
    return int(np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0] >> 1)
