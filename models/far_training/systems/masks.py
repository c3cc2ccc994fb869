"""How many tokens the encoder of a masked FAR or MAR may see while training, and which."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

DIRECTIONS = ("off", "paper", "code")
TOP = 0.7


def masked_count(direction: str, level: int, levels: int, tokens: int, chance: Generator) -> int:
    """Number of masked tokens at a level, 0 to `tokens`.

    "paper": the ratio falls linearly from 0.7 at level 0 to 0 at the highest (FAR section 3.3). "code": a normal
    centred at 1 with deviation 0.25, cut to [0.7 level / levels, 1] (the released models/far.py), so that it rises.
    ValueError for another direction.
    """
    if direction == "paper":
        ratio = TOP * (1 - level / max(levels - 1, 1))
    elif direction == "code":
        return random_count(TOP * level / levels, tokens, chance)
    else:
        raise ValueError(f"mask {direction!r}; known: {', '.join(DIRECTIONS)}")
    return rounded_up(ratio, tokens)


def random_count(least: float, tokens: int, chance: Generator) -> int:
    """Number of masked tokens whose share is normal around 1 with deviation 0.25, cut to [least, 1]: MAR's, and with
    least = 0.7 that of MAR's and FAR-T2I's released code."""
    return rounded_up(truncated_normal(least, chance), tokens)


def rounded_up(ratio: float, tokens: int) -> int:
    """A share of the tokens as a whole number, rounded up."""
    return math.ceil(ratio * tokens - 1e-9)


def truncated_normal(least: float, chance: Generator) -> float:
    """A draw from the normal around 1 with deviation 0.25, cut to [least, 1]; by rejection."""
    if least > 0.999:  # hardly a draw would get through
        return 1.0
    while True:
        ratio = 1 - abs(0.25 * chance.standard_normal())
        if ratio >= least:
            return float(ratio)


def visible_indices(drawn: Tensor, count: int) -> Tensor:
    """Rising indices [B, count] of random tokens, by random numbers drawn [B, tokens]."""
    return split_indices(drawn, count)[0]


def split_indices(drawn: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rising indices [B, count] of random tokens and those [B, tokens - count] of the others, by random numbers drawn
    [B, tokens]."""
    order = torch.argsort(drawn, dim=1)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def draw_levels(drawn: Tensor, levels: int, low: float) -> Tensor:
    """Training levels [n] from 0 to levels - 1, by random numbers drawn [n] from 0 to 1.

    Level i is drawn with a probability that falls linearly from (1 + low) p at level 0 to p at the highest; low = 0 is
    uniform, as in the released code.
    """
    weights = 1 + low * (1 - np.arange(levels) / max(levels - 1, 1))
    edges = np.cumsum(weights / weights.sum())[:-1]
    return torch.from_numpy(np.searchsorted(edges, drawn.numpy(), side="right").astype(np.int64))
