"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from far_training.loop.sharding import local


class EMA:
    """A second copy of a network whose weights follow the first; `ramped` lets it follow faster in the first steps.

    The decay at step n (from 0) is `decay`, or min(decay, (1 + n) / (10 + n)) when ramped, so that a short run is not
    dominated by its random start. The official decay is 0.9999, not ramped.
    """

    def __init__(self, model: nn.Module, decay: float, ramped: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay}; expected at least 0 and less than 1")
        self.decay = decay
        self.ramped = ramped
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """Decay that the update after step `step` (from 0) uses."""
        return min(self.decay, (1 + step) / (10 + step)) if self.ramped else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move every floating-point weight and buffer towards `model`'s."""
        mine, theirs = self.model.state_dict(), model.state_dict()
        pairs = [(local(mine[name]), local(theirs[name])) for name in mine if mine[name].is_floating_point()]
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - self.decay_at(step))
