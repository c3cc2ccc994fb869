"""The results of a benchmark: percentiles, rates, shares and speedups from the measured times, and their JSON form."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from far_runtime.bench.matmul_rate import DevicePrecision
from far_runtime.bench.runner import BatchRuns, BenchmarkRuns, EngineRuns
from far_runtime.engines.timed import COPIES
from far_runtime.errors import Message

FORMAT = 1
"""Version of the JSON form, whose keys are the fields of these classes."""

HOST = "host"
"""The stage name for a batch's time outside the stages: the loop, noise, and calls of the engine."""


@dataclass(frozen=True)
class StageResult:
    """One stage of one engine at one batch size; None stands for what is not known."""

    stage: str

    calls: int
    """Calls per batch."""

    count: int
    """Calls measured over all rounds."""

    p50_s: float
    """Median time of one call, in seconds."""

    p95_s: float
    """95th percentile of the same."""

    seconds: float
    """Time of all calls of a batch: the median over the rounds."""

    time_share: float
    """Share of the batch's time, 0 to 1."""

    gflop: float | None
    """Arithmetic of a batch in 10^9 operations."""

    gflop_per_s: float | None

    rate_share: float | None
    """`gflop_per_s` as a share of the machine's matmul rate, 0 to 1."""


@dataclass(frozen=True)
class Speedup:
    """How many times as fast an engine is as the first one, over the pairs of runs in the same round."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class BatchResult:
    """One engine at one batch size; None stands for what is not known."""

    batch: int

    skipped: str
    """Why there are no times, or ""."""

    first_s: float | None = None
    """Time of the first batch, in which graphs are loaded and compiled, in seconds."""

    seconds: tuple[float, ...] = ()
    """Time of a batch, by round."""

    p50_s: float | None = None
    """Median of `seconds`."""

    p95_s: float | None = None
    """95th percentile of `seconds`."""

    pictures_per_s: float | None = None

    gflop: float | None = None
    """Arithmetic of a batch in 10^9 operations."""

    gflop_per_s: float | None = None

    rate_share: float | None = None
    """`gflop_per_s` as a share of the machine's matmul rate, 0 to 1."""

    ratio: Speedup | None = None

    stages: tuple[StageResult, ...] = ()


@dataclass(frozen=True)
class EngineResult:
    """One engine; None stands for what is not known."""

    engine: str
    """Name as the user gave it."""

    name: str
    """Full name, device included."""

    version: str
    device: str

    precision: str
    """Precision of its matrix products."""

    note: str
    """What to know about that precision, or ""."""

    failure: str
    """Why the engine was given up, or ""."""

    open_s: float
    """Time to import the library and open the engine, in seconds."""

    load_s: float | None
    """`open_s`, and how much longer the first picture takes than a later one."""

    before_bytes: int | None
    """Peak resident memory before the engine was opened: Python and its modules."""

    peak_bytes: int | None
    """Peak resident memory over the whole run."""

    device_bytes: int | None
    """Peak GPU memory."""

    batches: tuple[BatchResult, ...]


@dataclass(frozen=True)
class MatmulResult:
    """The machine's rate of matrix products on one device in one precision.

    The fastest rate of all rounds counts, since other programs on the machine can only slow a product down.
    """

    device: str
    precision: str
    gflop_per_s: float

    method: str
    """The library with that rate."""

    methods: Mapping[str, float]
    """The fastest rate of every library, in GFLOP per second."""


@dataclass(frozen=True)
class BenchmarkResult:
    """All results of a benchmark."""

    rounds: int

    seconds: float
    """Time of all rounds."""

    product_size: int
    """Rows and columns of the matrices whose product is the machine's rate."""

    gflop: Mapping[str, float]
    """Arithmetic of one picture by stage, in 10^9 operations."""

    rates: tuple[MatmulResult, ...]
    engines: tuple[EngineResult, ...]

    @property
    def failures(self) -> list[Message]:
        """A sentence for every engine that was given up."""
        return [Message(f"engine {engine.engine}: ", engine.failure) for engine in self.engines if engine.failure]

    @property
    def baseline(self) -> str:
        """The engine that speedups refer to: the first that was not given up; "" where there is none."""
        return next((engine.engine for engine in self.engines if not engine.failure), "")

    def to_dict(self, **surroundings: Any) -> dict[str, Any]:
        """The JSON form, with `surroundings` (bundle, settings, machine) before the results."""
        return {"format": FORMAT, **surroundings, **asdict(self)}


def summarize(runs: BenchmarkRuns, flops: Mapping[str, float]) -> BenchmarkResult:
    """The results of a benchmark; flops: operations of one picture by stage."""
    rates = tuple(_matmul(target, methods) for target, methods in runs.matmul.items() if any(methods.values()))
    gflops = {(rate.device, rate.precision): rate.gflop_per_s for rate in rates}
    baseline = next((engine for engine in runs.engines if not engine.failure), None)
    return BenchmarkResult(
        rounds=runs.rounds,
        seconds=runs.seconds,
        product_size=runs.matmul_size,
        gflop={name: flop / 1e9 for name, flop in flops.items()},
        rates=rates,
        engines=tuple(_engine(engine, baseline, flops, gflops.get(engine.target)) for engine in runs.engines),
    )


def _matmul(target: DevicePrecision, methods: Mapping[str, Sequence[float]]) -> MatmulResult:
    fastest = {name: max(rates) / 1e9 for name, rates in methods.items() if rates}
    best = max(fastest, key=lambda name: fastest[name])
    device, precision = target
    return MatmulResult(device, precision, gflop_per_s=fastest[best], method=best, methods=fastest)


def _engine(
    runs: EngineRuns, baseline: EngineRuns | None, flops: Mapping[str, float], rate: float | None
) -> EngineResult:
    """rate: the machine's matmul rate for the engine's device and precision, in GFLOP per second."""
    batches = tuple(
        _batch(size, of_size, baseline.batches.get(size) if baseline else None, flops, rate)
        for size, of_size in runs.batches.items()
    )
    by_size = sorted(batches, key=lambda batch: batch.batch)
    extra = next((max(0.0, batch.first_s - batch.p50_s) for batch in by_size if batch.first_s and batch.p50_s), None)
    return EngineResult(
        engine=runs.given,
        name=runs.opened.name,
        version=runs.opened.version,
        device=runs.target[0],
        precision=runs.precision,
        note=runs.note,
        failure=runs.failure,
        open_s=runs.opened.seconds,
        load_s=None if extra is None else runs.opened.seconds + extra,
        before_bytes=runs.opened.memory,
        peak_bytes=runs.memory.resident,
        device_bytes=runs.memory.device,
        batches=batches,
    )


def _batch(
    batch: int, runs: BatchRuns, baseline: BatchRuns | None, flops: Mapping[str, float], rate: float | None
) -> BatchResult:
    if runs.skipped or not runs.whole:
        return BatchResult(batch, runs.skipped or "not measured")
    seconds = tuple(runs.whole.values())
    p50, gflop = percentile(seconds, 50), batch * sum(flops.values()) / 1e9
    return BatchResult(
        batch=batch,
        skipped="",
        first_s=runs.first,
        seconds=seconds,
        p50_s=p50,
        p95_s=percentile(seconds, 95),
        pictures_per_s=batch / p50,
        gflop=gflop,
        gflop_per_s=gflop / p50,
        rate_share=gflop / p50 / rate if rate else None,
        ratio=_speedup(runs, baseline),
        stages=tuple(_stages(batch, runs, flops, rate)),
    )


def _speedup(runs: BatchRuns, baseline: BatchRuns | None) -> Speedup | None:
    if baseline is None or baseline.skipped:
        return None
    ratios = [baseline.whole[done] / seconds for done, seconds in runs.whole.items() if done in baseline.whole]
    return Speedup(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def _stages(batch: int, runs: BatchRuns, flops: Mapping[str, float], rate: float | None) -> list[StageResult]:
    """The stages in the order of their first calls, then the copies, then the host."""
    if not runs.staged:
        return []
    names = list(dict.fromkeys(name for staged in runs.staged for name in staged.calls))
    names.sort(key=lambda name: name == COPIES)
    total = sum(staged.seconds for staged in runs.staged)
    results = []
    for name in names:
        calls = [staged.calls.get(name, []) for staged in runs.staged]
        results.append(_stage(name, calls, total, batch * flops[name] / 1e9 if name in flops else None, rate))
    host = [[staged.seconds - sum(map(sum, staged.calls.values()))] for staged in runs.staged]
    return [*results, _stage(HOST, host, total, None, rate)]


def _stage(
    name: str, calls: Sequence[Sequence[float]], total: float, gflop: float | None, rate: float | None
) -> StageResult:
    """calls: seconds of every call, by round. total: seconds of all batches. gflop: of a batch."""
    every_call = [seconds for of_batch in calls for seconds in of_batch]
    seconds = statistics.median(sum(of_batch) for of_batch in calls)
    per_s = gflop / seconds if gflop and seconds > 0 else None
    return StageResult(
        stage=name,
        calls=max(len(of_batch) for of_batch in calls),
        count=len(every_call),
        p50_s=percentile(every_call, 50),
        p95_s=percentile(every_call, 95),
        seconds=seconds,
        time_share=sum(every_call) / total,
        gflop=gflop,
        gflop_per_s=per_s,
        rate_share=per_s / rate if per_s and rate else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, interpolated linearly."""
    return float(np.percentile(values, percent))
