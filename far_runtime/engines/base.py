"""The Engine protocol: what the sampling loops need of whatever executes the stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any
"""An array that lives where the engine computes. The loops only pass it on from stage to stage."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs, whichever it is; an engine passes over what does not concern it.

    threads: of the CPU; None is the engine's own choice.
    """

    threads: int | None = None


class Engine(Protocol):
    """Executes the stages of one bundle.

    Arrays stay on the engine's device between `put` and `get`. `run` takes a stage's input arrays by name and its
    host-side constants (level, lowpass: integers that a graph either takes as [1] int64 inputs or has folded in), and
    returns its outputs by name.
    """

    name: str

    def put(self, array: NDArray[Any]) -> Array:
        """Copy a NumPy array to the device."""

    def get(self, array: Array) -> NDArray[Any]:
        """Copy an array back to the host."""

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        """Execute one stage. Raises FarError where no graph of the bundle fits the constants."""

    def close(self) -> None:
        """Give the engine's memory back."""


def scalar(value: float, dtype: Any = np.float32) -> NDArray[Any]:
    """A [1] array: the form in which numbers enter a stage."""
    return np.array([value], dtype)
