"""The Engine protocol: what the sampling loops need of whatever executes the stages."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = Any
"""An array on the engine's device. The sampling loops only pass it on from stage to stage."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs; every engine ignores the options that do not concern it."""

    threads: int | None = None
    """Threads on the CPU; None: the engine decides."""
    mode: str = "latency"
    """What OpenVINO is tuned for: "latency" or "throughput"."""
    pinning: bool | None = None
    """Whether OpenVINO keeps each thread on one core; None: it decides."""
    arena: bool = True
    """Whether ONNX Runtime keeps CPU memory for the next call."""
    low_memory: bool = False
    """Whether OpenVINO and ONNX Runtime hold one graph at a time, and load it again after another one was used."""
    cuda_graph: bool = True
    """Whether TensorRT captures whole generations as CUDA graphs."""
    weight_budget: int | None = None
    """MiB of weights that stay on the GPU, for each TensorRT engine with weight streaming; None: all weights."""


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
        """Free the engine's memory."""


Generate = Callable[[Engine], Mapping[str, Array]]
"""Runs a whole generation on an engine; returns the arrays that are to be read, by name."""


@runtime_checkable
class CapturingEngine(Protocol):
    """An engine that can capture a whole generation and replay it."""

    def run_generation(self, key: Hashable, generate: Generate) -> dict[str, NDArray[Any]]:
        """Run `generate`; returns its arrays on the host."""


def run_generation(engine: Engine, key: Hashable, generate: Generate) -> dict[str, NDArray[Any]]:
    """Run a whole generation and read its arrays.

    key: all that the sequence of its calls depends on. An engine that has run a generation of the same key may run
    `generate` without computing anything, and then repeat the recorded work on the new arrays; it may also run
    `generate` twice. So `generate` reads nothing from the engine, and takes every array from `put` and `run`.
    """
    if isinstance(engine, CapturingEngine):
        return engine.run_generation(key, generate)
    return {name: np.array(engine.get(array)) for name, array in generate(engine).items()}


def smallest_batch(engine: Engine) -> int:
    """The fewest pictures that an engine draws at once: 1, unless its graphs were compiled for more (its attribute
    `smallest_batch`)."""
    return int(getattr(engine, "smallest_batch", 1))


def scalar(value: float, dtype: Any = np.float32) -> NDArray[Any]:
    """A [1] array: the form in which numbers enter a stage."""
    return np.array([value], dtype)
