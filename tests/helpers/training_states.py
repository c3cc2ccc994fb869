"""Training states of runs, to compare."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch


def load_state(run: Path) -> dict[str, Any]:
    """The state that a run left."""
    with torch.serialization.safe_globals([Namespace]):
        state: dict[str, Any] = torch.load(run / "checkpoint-last.pth", weights_only=True)
    return state


def identical(a: object, b: object) -> bool:
    """Whether two states are the same bit for bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
