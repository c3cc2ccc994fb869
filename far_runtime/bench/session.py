"""What an engine's process does: open the engine, draw, and say what it took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from far_runtime.bench.contenders import GPU, Contender, Sources, device_of
from far_runtime.bundle import open_bundle
from far_runtime.conditioning.subjects import Subject
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.timed import TimedEngine
from far_runtime.machine.gpu import gpu_memory
from far_runtime.machine.memory import peak_memory
from far_runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Opened:
    """An engine that has been opened. name: its own, device included. seconds: from the start of its library's import
    on. memory: resident before, in bytes."""

    name: str
    version: str
    seconds: float
    memory: int | None


@dataclass(frozen=True)
class Memory:
    """The most that the process has held so far, in bytes; None where it cannot be told."""

    resident: int | None = None
    device: int | None = None


@dataclass(frozen=True)
class Staged:
    """A batch drawn with a clock around every stage: seconds in all, and of every call by stage."""

    seconds: float
    calls: Mapping[str, list[float]]


@dataclass
class EngineSession:
    """One engine over one bundle. It draws `subjects` in turn with the seeds seed, seed + 1, ...: the same pictures on
    every engine."""

    bundle: Path
    contender: Contender
    options: EngineOptions
    sources: Sources
    subjects: tuple[Subject, ...]
    seed: int
    sampling: Mapping[str, Any]
    _pipeline: Any = field(default=None, init=False)
    _device_before: int = field(default=0, init=False)
    _device_peak: int | None = field(default=None, init=False)

    def open(self) -> Opened:
        """Open the engine; FarError where that cannot be."""
        before = peak_memory()
        bundle = open_bundle(self.bundle, check=False)  # checked by the process that asks
        if device_of(self.contender.name) == GPU:
            self._device_before = (gpu_memory() or {}).get("used_bytes", 0)
        started = time.perf_counter()
        engine = self.contender.open(bundle, self.options, self.sources)
        seconds = time.perf_counter() - started
        # Every picture is measured as the first one of its label.
        self._pipeline = Pipeline(bundle, engine, self.options.threads, cache_bytes=0)
        return Opened(engine.name, str(getattr(engine, "version", "")), seconds, before)

    def whole(self, batch: int) -> float:
        """Seconds from subjects and seeds to pictures on the host, for so many pictures at once."""
        seconds = self._draw(self._pipeline, batch)
        self._note_device()
        return seconds

    def staged(self, batch: int) -> Staged:
        """The same with a clock around every stage."""
        timed = TimedEngine(self._pipeline.engine)
        seconds = self._draw(Pipeline(self._pipeline.bundle, timed, cache_bytes=0), batch)
        return Staged(seconds, timed.seconds)

    def memory(self) -> Memory:
        """What the process has held at most."""
        return Memory(peak_memory(), self._device_peak)

    def _draw(self, pipeline: Pipeline, batch: int) -> float:
        subjects = [self.subjects[i % len(self.subjects)] for i in range(batch)]
        seeds = [self.seed + i for i in range(batch)]
        started = time.perf_counter()
        pipeline.generate(subjects, seeds, batch_size=batch, **self.sampling)
        return time.perf_counter() - started

    def _note_device(self) -> None:
        if device_of(self._pipeline.engine.name) == GPU:
            used = (gpu_memory() or {}).get("used_bytes")
            if used is not None:
                self._device_peak = max(self._device_peak or 0, used - self._device_before)
