"""Seconds of every stage call of an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from numpy.typing import NDArray

from far_runtime.engines.base import Array, CapturingEngine, Engine, Generate, run_generation, smallest_batch

COPIES = "copies"
"""The key of the seconds of `put` and `get`."""


class TimedEngine:
    """An engine that records how long every call takes, in `seconds` by stage.

    An engine that computes asynchronously has a method `synchronize`. It is called after every stage, so that a stage's
    time is its own; what the engine gains by not waiting shows only in the time of whole pictures. Generations are not
    captured, since only the methods that the sampling loops need are passed on.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.perf_counter) -> None:
        self.name = engine.name
        self.version: str = getattr(engine, "version", "")
        self.smallest_batch = smallest_batch(engine)
        self.seconds: dict[str, list[float]] = {}
        self._engine = engine
        self._clock = clock
        self._wait: Callable[[], object] = getattr(engine, "synchronize", lambda: None)

    def put(self, array: NDArray[Any]) -> Array:
        return self._timed(COPIES, lambda: self._engine.put(array))

    def get(self, array: Array) -> NDArray[Any]:
        host: NDArray[Any] = self._timed(COPIES, lambda: self._engine.get(array))
        return host

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        outputs: dict[str, Array] = self._timed(stage, lambda: self._engine.run(stage, inputs, constants))
        return outputs

    def close(self) -> None:
        self._engine.close()

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        started = self._clock()
        result = call()
        self._wait()
        self.seconds.setdefault(name, []).append(self._clock() - started)
        return result


class SampledEngine(TimedEngine):
    """A timed engine that times one of `every` generations stage by stage, and lets the engine capture the others."""

    def __init__(self, engine: Engine, every: int = 16, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(engine, clock)
        self._every, self._count = every, 0

    def run_generation(self, key: Hashable, generate: Generate) -> dict[str, NDArray[Any]]:
        turn, self._count = self._count, (self._count + 1) % self._every
        if turn:
            # What was computed before would pass for the generation's.
            self.seconds.clear()
            return run_generation(self._engine, key, generate)
        return {name: self.get(array).copy() for name, array in generate(self).items()}


def timed(engine: Engine) -> TimedEngine:
    """An engine that is timed, and that still captures generations if it can."""
    return SampledEngine(engine) if isinstance(engine, CapturingEngine) else TimedEngine(engine)
