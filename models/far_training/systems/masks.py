"""How many tokens of a masked FAR or MAR the encoder sees in training, and which; and the levels of FAR's samples."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

DIRECTIONS = ("off", "paper", "code")
TOP = 0.7
"""Mask ratio at level 0 in the paper; least mask ratio at the highest level in the code."""
DEVIATION = 0.25
"""Standard deviation of the code's mask ratios."""


def masked_count(direction: str, level: int, levels: int, tokens: int, rng: Generator) -> int:
    """Number of masked tokens at a level, 0 to `tokens`; ValueError for an unknown direction.

    "paper": the ratio falls linearly from 0.7 at level 0 to 0 at the highest (FAR section 3.3).
    "code": the ratio is normal around 1, cut to [0.7 level / levels, 1], and so rises (the released models/far.py).
    """
    if direction == "paper":
        return rounded_up(TOP * (1 - level / max(levels - 1, 1)), tokens)
    if direction == "code":
        return random_count(TOP * level / levels, tokens, rng)
    raise ValueError(f"mask {direction!r}; known: {', '.join(DIRECTIONS)}")


def random_count(least: float, tokens: int, rng: Generator) -> int:
    """Number of masked tokens, whose share is normal around 1 with deviation 0.25, cut to [least, 1].

    The released code of MAR and FAR-T2I has least = 0.7.
    """
    return rounded_up(truncated_normal(least, rng), tokens)


def rounded_up(ratio: float, tokens: int) -> int:
    """A share of the tokens as a whole number, rounded up."""
    return math.ceil(ratio * tokens - 1e-9)


def truncated_normal(least: float, rng: Generator) -> float:
    """A number from the normal around 1 with deviation 0.25, cut to [least, 1], by rejection."""
    if least > 0.999:  # almost every number would be rejected
        return 1.0
    while True:
        ratio = 1 - abs(DEVIATION * rng.standard_normal())
        if ratio >= least:
            return float(ratio)


def visible_indices(numbers: Tensor, count: int) -> Tensor:
    """Rising indices [B, count] of random tokens, by random numbers [B, tokens]."""
    return split_indices(numbers, count)[0]


def split_indices(numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rising indices of random tokens [B, count] and of the others [B, tokens - count], by random numbers [B,
    tokens]."""
    order = torch.argsort(numbers, dim=1)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def levels_of(numbers: Tensor, levels: int, low: float) -> Tensor:
    """Training levels [n] from 0 to levels - 1, by random numbers [n] from 0 to 1.

    The probability of a level falls linearly from (1 + low) p at level 0 to p at the highest; low = 0 is uniform, as in
    the released code.
    """
    weights = 1 + low * (1 - np.arange(levels) / max(levels - 1, 1))
    edges = np.cumsum(weights / weights.sum())[:-1]
    return torch.from_numpy(np.searchsorted(edges, numbers.numpy(), side="right").astype(np.int64))
