"""Parts of a network that compute in float32 whatever its precision: islands, by the names that a Stage declares.

In a float32 network they change nothing. Norms are islands by their modules, which keep float32 weights
(far_export/cast.py); what is a function and no module is marked where it computes, with `island`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_passed: ContextVar[set[str] | None] = ContextVar("passed", default=None)


def island(name: str) -> None:
    """Note that the lines below compute in float32, under the island's name."""
    if torch.compiler.is_dynamo_compiling():
        return
    names = _passed.get()
    if names is not None:
        names.add(name)


@contextmanager
def passed_islands() -> Iterator[set[str]]:
    """The names of the islands that networks come past inside the block."""
    names: set[str] = set()
    token = _passed.set(names)
    try:
        yield names
    finally:
        _passed.reset(token)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis, computed in float32 and given back in the precision of the scores."""
    island("softmax")
    return torch.softmax(scores.float(), dim=-1).to(scores.dtype)
