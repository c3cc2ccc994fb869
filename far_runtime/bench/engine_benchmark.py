"""What runs in an engine's process: open the engine, generate pictures, report times and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from far_runtime.bench.engine_specs import GPU, CheckpointFiles, EngineSpec, device_of
from far_runtime.bundle import open_bundle
from far_runtime.conditioning.subjects import Subject
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.timed import TimedEngine
from far_runtime.machine.gpu import gpu_memory
from far_runtime.machine.memory import peak_memory
from far_runtime.pipeline import Pipeline


@dataclass(frozen=True)
class OpenedEngine:
    """An engine that has been opened."""

    name: str
    """Full name, device included."""

    version: str
    """Version of its library."""

    seconds: float
    """Time to import the library and open the engine."""

    memory: int | None
    """Peak resident memory of the process before that, in bytes; None where the system does not tell."""


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that a process has held so far, in bytes; None where it cannot be read."""

    resident: int | None = None
    """On the host."""

    device: int | None = None
    """On the GPU."""


@dataclass(frozen=True)
class StageTimes:
    """Times of one batch that was generated with a clock around every stage."""

    seconds: float
    """Time of the whole batch."""

    calls: Mapping[str, list[float]]
    """Seconds of every call, by stage."""


@dataclass
class EngineBenchmark:
    """One engine over one bundle, as the target of a `Worker`; every engine generates the same pictures."""

    bundle: Path
    engine: EngineSpec
    options: EngineOptions
    files: CheckpointFiles

    subjects: tuple[Subject, ...]
    """Picture i of a batch shows subject i, modulo their number."""

    seed: int
    """Picture i of a batch has the seed `seed` + i."""

    sampling: Mapping[str, Any]
    """Sampling settings."""

    _pipeline: Any = field(default=None, init=False)
    _device_before: int = field(default=0, init=False)
    _device_peak: int | None = field(default=None, init=False)

    def open(self) -> OpenedEngine:
        """Open the engine; FarError where that is not possible."""
        before = peak_memory()
        # The process of the command has compared the checksums.
        bundle = open_bundle(self.bundle, check=False)
        if device_of(self.engine.name) == GPU:
            self._device_before = (gpu_memory() or {}).get("used_bytes", 0)
        started = time.perf_counter()
        engine = self.engine.open(bundle, self.options, self.files)
        seconds = time.perf_counter() - started
        # Without the cache of conditions, every picture costs what the first one of its label does.
        self._pipeline = Pipeline(bundle, engine, self.options.threads, cache_bytes=0)
        return OpenedEngine(
            name=engine.name, version=str(getattr(engine, "version", "")), seconds=seconds, memory=before
        )

    def time_batch(self, batch: int) -> float:
        """Seconds to generate `batch` pictures, from subjects and seeds to pixels on the host."""
        seconds = self._generate(self._pipeline, batch)
        if device_of(self._pipeline.engine.name) == GPU:
            used = (gpu_memory() or {}).get("used_bytes")
            if used is not None:
                self._device_peak = max(self._device_peak or 0, used - self._device_before)
        return seconds

    def time_stages(self, batch: int) -> StageTimes:
        """Generate the same `batch` pictures with a clock around every stage."""
        timed = TimedEngine(self._pipeline.engine)
        seconds = self._generate(Pipeline(self._pipeline.bundle, timed, cache_bytes=0), batch)
        return StageTimes(seconds, timed.seconds)

    def peak_memory(self) -> PeakMemory:
        """The most memory that this process has held so far."""
        return PeakMemory(peak_memory(), self._device_peak)

    def _generate(self, pipeline: Pipeline, batch: int) -> float:
        subjects = [self.subjects[i % len(self.subjects)] for i in range(batch)]
        seeds = [self.seed + i for i in range(batch)]
        started = time.perf_counter()
        pipeline.generate(subjects, seeds, batch_size=batch, **self.sampling)
        return time.perf_counter() - started
