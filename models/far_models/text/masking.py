"""Attention in which some tokens may not be looked at."""

from __future__ import annotations

from torch import Tensor

from far_models.islands import softmax

HIDDEN = -30000.0
"""Score of a token that may not be attended to: its weight underflows to exactly 0, and half precision can hold it."""


def attend_allowed(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Scaled dot-product attention of [..., n, d] tensors over the keys where `allowed` (broadcast to [..., n, n]) is
    true."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return softmax(scores.masked_fill(~allowed, HIDDEN)) @ v
