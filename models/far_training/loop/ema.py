"""Exponential moving average (EMA) of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from far_training.loop.sharding import local_part


class EMA:
    """A copy of a network whose weights are the moving average of the network's.

    The decay at step n (from 0) is `decay`. When `ramped`, it is min(decay, (1 + n) / (10 + n)), so that a short run is
    not dominated by its random start. The official decay is 0.9999, not ramped. ValueError for a decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, ramped: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay}; expected at least 0 and less than 1")
        self.decay = decay
        self.ramped = ramped
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """Decay of the update after step `step` (from 0)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.ramped else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move every floating-point weight and buffer towards `model`'s."""
        averages, weights = self.model.state_dict(), model.state_dict()
        names = [name for name, average in averages.items() if average.is_floating_point()]
        targets = [local_part(weights[name]) for name in names]
        torch._foreach_lerp_([local_part(averages[name]) for name in names], targets, 1 - self.decay_at(step))
