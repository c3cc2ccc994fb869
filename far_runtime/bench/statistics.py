"""From what was measured to what is shown: percentiles, rates, shares and ratios, and their JSON form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from far_runtime.bench.matmul_rate import Kind
from far_runtime.bench.rounds import BatchRuns, EngineRuns, Runs
from far_runtime.engines.timed import COPIES
from far_runtime.errors import Message

FORMAT = 1
HOST = "host"
"""The stage name for what a batch takes outside the stages: the loop, noise, and handing over."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the sorted values lie, between two of them by their distance (NumPy's
    "linear"). ValueError for no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class StageFigures:
    """One stage at one batch size. calls: in one batch; count: measured over all rounds. p50_s, p95_s: of one call.
    seconds: of all calls of a batch, median over the rounds; time_share: of the whole batch. gflop: arithmetic of a
    batch, and per second; rate_share: of the machine's matrix product. None: not known."""

    stage: str
    calls: int
    count: int
    p50_s: float
    p95_s: float
    seconds: float
    time_share: float
    gflop: float | None
    gflop_per_s: float | None
    rate_share: float | None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the first engine, from runs of the same round: median, smallest and largest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class BatchFigures:
    """One batch size. skipped: why there are no figures, or "". first_s: the first batch, with whatever is loaded and
    compiled then. seconds: of the batches of all rounds, p50_s and p95_s of these. gflop, gflop_per_s, rate_share: of
    the whole, as of stages."""

    batch: int
    skipped: str
    first_s: float | None = None
    seconds: tuple[float, ...] = ()
    p50_s: float | None = None
    p95_s: float | None = None
    pictures_per_s: float | None = None
    gflop: float | None = None
    gflop_per_s: float | None = None
    rate_share: float | None = None
    ratio: Ratio | None = None
    stages: tuple[StageFigures, ...] = ()


@dataclass(frozen=True)
class EngineFigures:
    """One engine. engine: as it was asked for; name: in full. precision: what it multiplies in. failure: why it was
    given up, or "". open_s: library and engine; load_s: that, and what the first picture took longer than later ones.
    peak_bytes: resident memory at most, of which before_bytes was Python's before the engine was opened. device_bytes:
    GPU memory at most."""

    engine: str
    name: str
    version: str
    device: str
    precision: str
    note: str
    failure: str
    open_s: float
    load_s: float | None
    before_bytes: int | None
    peak_bytes: int | None
    device_bytes: int | None
    batches: tuple[BatchFigures, ...]


@dataclass(frozen=True)
class Rate:
    """The machine's matrix product on a device in a precision: the fastest that was seen in any round, so that what
    else the machine did then does not pass for its limit. methods: the fastest of each."""

    device: str
    precision: str
    gflop_per_s: float
    method: str
    methods: Mapping[str, float]


@dataclass(frozen=True)
class Figures:
    """All figures of a run. gflop: arithmetic of one picture by stage."""

    rounds: int
    seconds: float
    product_size: int
    gflop: Mapping[str, float]
    rates: tuple[Rate, ...]
    engines: tuple[EngineFigures, ...]

    @property
    def failures(self) -> list[Message]:
        """A sentence for every engine that was given up."""
        return [Message(f"engine {engine.engine}: ", engine.failure) for engine in self.engines if engine.failure]

    @property
    def first(self) -> str:
        """The engine that ratios refer to: the first that was not given up."""
        return next((engine.engine for engine in self.engines if not engine.failure), "")

    def rate(self, engine: EngineFigures) -> Rate | None:
        """What an engine is held against."""
        found = (rate for rate in self.rates if (rate.device, rate.precision) == (engine.device, engine.precision))
        return next(found, None)

    def to_dict(self, **surroundings: Any) -> dict[str, Any]:
        """JSON form, behind what else is to be said of the run."""
        return {"format": FORMAT, **surroundings, **asdict(self)}


def figures_of(runs: Runs, flops: Mapping[str, float]) -> Figures:
    """All figures. flops: operations of one picture by stage."""
    rates = tuple(rate for kind, methods in runs.products.items() if (rate := _rate(kind, methods)) is not None)
    by_kind = {(rate.device, rate.precision): rate.gflop_per_s for rate in rates}
    first = next((engine for engine in runs.engines if not engine.failure), None)
    engines = tuple(_engine(engine, first, flops, by_kind.get(engine.kind)) for engine in runs.engines)
    gflop = {name: flop / 1e9 for name, flop in flops.items()}
    return Figures(runs.rounds, runs.seconds, runs.product_size, gflop, rates, engines)


def _rate(kind: Kind, methods: Mapping[str, Sequence[float]]) -> Rate | None:
    fastest = {name: max(rates) / 1e9 for name, rates in methods.items() if rates}
    if not fastest:
        return None
    best = max(fastest, key=lambda name: fastest[name])
    return Rate(*kind, fastest[best], best, fastest)


def _engine(
    runs: EngineRuns, first: EngineRuns | None, flops: Mapping[str, float], rate: float | None
) -> EngineFigures:
    batches = tuple(
        _batch(batch, of_batch, first.batches.get(batch) if first else None, flops, rate)
        for batch, of_batch in runs.batches.items()
    )
    warm = next((one for one in sorted(batches, key=lambda one: one.batch) if one.first_s and one.p50_s), None)
    later = None if warm is None or warm.first_s is None or warm.p50_s is None else max(0.0, warm.first_s - warm.p50_s)
    return EngineFigures(
        engine=runs.given,
        name=runs.opened.name,
        version=runs.opened.version,
        device=runs.kind[0],
        precision=runs.precision,
        note=runs.note,
        failure=runs.failure,
        open_s=runs.opened.seconds,
        load_s=None if later is None else runs.opened.seconds + later,
        before_bytes=runs.opened.memory,
        peak_bytes=runs.memory.resident,
        device_bytes=runs.memory.device,
        batches=batches,
    )


def _batch(
    batch: int, runs: BatchRuns, first: BatchRuns | None, flops: Mapping[str, float], rate: float | None
) -> BatchFigures:
    if runs.skipped or not runs.whole:
        return BatchFigures(batch, runs.skipped or "not measured")
    seconds = tuple(runs.whole.values())
    p50, gflop = percentile(seconds, 50), batch * sum(flops.values()) / 1e9
    return BatchFigures(
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
        ratio=_ratio(runs, first),
        stages=tuple(_stages(batch, runs, flops, rate)),
    )


def _ratio(runs: BatchRuns, first: BatchRuns | None) -> Ratio | None:
    if first is None or first.skipped:
        return None
    ratios = [first.whole[done] / seconds for done, seconds in runs.whole.items() if done in first.whole]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def _stages(batch: int, runs: BatchRuns, flops: Mapping[str, float], rate: float | None) -> list[StageFigures]:
    """A row for each stage in the order in which they first ran, then the copies, then the host."""
    if not runs.staged:
        return []
    names = list(dict.fromkeys(name for staged in runs.staged for name in staged.calls))
    names.sort(key=lambda name: name == COPIES)
    whole = sum(staged.seconds for staged in runs.staged)
    rows = []
    for name in names:
        calls = [staged.calls.get(name, []) for staged in runs.staged]
        rows.append(_stage(name, calls, whole, batch * flops[name] / 1e9 if name in flops else None, rate))
    host = [[staged.seconds - sum(map(sum, staged.calls.values()))] for staged in runs.staged]
    return [*rows, _stage(HOST, host, whole, None, rate)]


def _stage(
    name: str, calls: Sequence[Sequence[float]], whole: float, gflop: float | None, rate: float | None
) -> StageFigures:
    single = [seconds for of_batch in calls for seconds in of_batch]
    seconds = statistics.median(sum(of_batch) for of_batch in calls)
    per_s = gflop / seconds if gflop and seconds > 0 else None
    return StageFigures(
        stage=name,
        calls=max(len(of_batch) for of_batch in calls),
        count=len(single),
        p50_s=percentile(single, 50),
        p95_s=percentile(single, 95),
        seconds=seconds,
        time_share=sum(single) / whole,
        gflop=gflop,
        gflop_per_s=per_s,
        rate_share=per_s / rate if per_s and rate else None,
    )
