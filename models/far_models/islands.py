"""FP32 islands: parts of a network that compute in float32 at every precision, by the names that a Stage declares.

Norm layers are islands as modules, since they keep float32 weights (far_export/cast.py). Functions mark themselves by
calling `island`. In a float32 network islands change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_recorded: ContextVar[set[str] | None] = ContextVar("recorded", default=None)


def island(name: str) -> None:
    """Record that the code below this call computes in float32, under the island's name."""
    if torch.compiler.is_dynamo_compiling():
        return
    names = _recorded.get()
    if names is not None:
        names.add(name)


@contextmanager
def recorded_islands() -> Iterator[set[str]]:
    """The names of all islands that run inside the block."""
    names: set[str] = set()
    token = _recorded.set(names)
    try:
        yield names
    finally:
        _recorded.reset(token)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis, computed in float32 and returned in the precision of the scores."""
    island("softmax")
    return torch.softmax(scores.float(), dim=-1).to(scores.dtype)
