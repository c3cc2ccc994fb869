"""Runs a benchmark in interleaved rounds: each batch size on one engine after the other, so that a machine that slows
down or speeds up does so for all engines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from far_runtime.bench.engine_benchmark import EngineBenchmark, OpenedEngine, PeakMemory, StageTimes
from far_runtime.bench.engine_specs import GPU, compute_precision, device_of
from far_runtime.bench.matmul_rate import DevicePrecision, MatmulRate
from far_runtime.bench.worker_process import Worker, WorkerError
from far_runtime.errors import FarError, Message

REST = 0.25
"""Seconds between two engines. ONNX Runtime's threads were seen to spin for 0.2 s after a run."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

BATCH, STAGES = "whole", "stages"
"""The two runs of every engine and batch size in a round: as `far generate` does, and with a clock around stages."""

OnProgress = Callable[[int, int | None, str], None]
"""Takes the number of runs done, their total (None: not known) and what runs next."""

StartWorker = Callable[..., Worker]


@dataclass(frozen=True)
class RunLimit:
    """When to stop: after a number of rounds, or by time where `seconds` is given."""

    rounds: int | None = 10
    """Number of rounds."""

    seconds: float | None = None
    """New rounds begin within this time; there is at least one."""

    def allows(self, done: int, seconds: float) -> bool:
        """Whether another round follows `done` rounds that took `seconds`."""
        if self.seconds is not None:
            return done == 0 or seconds < self.seconds
        return done < (self.rounds or 1)


@dataclass
class BatchRuns:
    """Times of one engine at one batch size."""

    first: float = 0.0
    """Seconds of the first run, in which graphs are loaded or compiled."""

    whole: dict[int, float] = field(default_factory=dict)
    """Seconds of a batch, by round."""

    staged: list[StageTimes] = field(default_factory=list)
    """Times by stage, a run per round."""

    skipped: str = ""
    """Why this batch size was given up, or ""."""


@dataclass
class EngineRuns:
    """Everything that was measured of one engine."""

    given: str
    """Name as the user gave it."""

    opened: OpenedEngine

    precision: str
    """Precision of its matrix products."""

    note: str
    """What to know about that precision, or ""."""

    plugin: bool
    """Whether another package adds the engine."""

    batches: dict[int, BatchRuns]
    """Times by batch size."""

    memory: PeakMemory = field(default_factory=PeakMemory)

    failure: str = ""
    """Why the engine was given up, or ""; what it had measured until then stays."""

    @property
    def target(self) -> DevicePrecision:
        """Device and precision of its matrix products."""
        return device_of(self.opened.name), self.precision

    @property
    def active_batches(self) -> list[int]:
        """The batch sizes that are still measured."""
        return [] if self.failure else [batch for batch, runs in self.batches.items() if not runs.skipped]


@dataclass(frozen=True)
class BenchmarkRuns:
    """Everything that was measured."""

    engines: list[EngineRuns]

    matmul: dict[DevicePrecision, dict[str, list[float]]]
    """Operations per second of the machine's matrix products, by target, method and round."""

    matmul_size: int
    """Rows and columns of those matrices."""

    rounds: int
    """Number of rounds."""

    seconds: float
    """Time of all rounds."""

    order: list[tuple[int, int, str, str]]
    """(round, batch size, engine, BATCH or STAGES) of every run, in order."""


def run_benchmark(
    benchmarks: Sequence[EngineBenchmark],
    precision: str,
    batches: Sequence[int],
    limit: RunLimit,
    matmul: Callable[[tuple[DevicePrecision, ...]], MatmulRate],
    on_progress: OnProgress | None = None,
    start: StartWorker = Worker,
    clock: Callable[[], float] = time.monotonic,
) -> BenchmarkRuns:
    """Open all engines, warm them up at every batch size, then measure round by round.

    precision: that of the bundle.
    matmul: makes the measurement of the machine's matrix products for the targets of the engines.
    start, clock: replaced by tests.

    An engine that does not open is a FarError before anything is measured. An engine that fails later is given up, and
    the others go on. A batch size that does not fit into memory is skipped, and so are the larger ones.
    """
    report = on_progress or (lambda done, total, title: None)
    with contextlib.ExitStack() as stack:
        runners = []
        for benchmark in benchmarks:
            report(0, None, f"open {benchmark.engine.name}")
            runners.append(_EngineRunner(benchmark, precision, batches, stack, start))
        engines = [runner.runs for runner in runners]
        rates = _MatmulRunner(matmul(tuple(dict.fromkeys(engine.target for engine in engines))), stack, start)
        for batch in sorted(batches):
            for runner in runners:
                report(0, None, f"warm up {runner.runs.given}, batch {batch}")
                runner.warm_up(batch)
        order: list[tuple[int, int, str, str]] = []
        done, started = 0, clock()
        total = None
        if limit.seconds is None:
            total = 2 * sum(len(engine.active_batches) for engine in engines) * (limit.rounds or 1)
        while limit.allows(done, clock() - started) and any(engine.active_batches for engine in engines):
            rates.measure()
            for runner, batch, timing in _round(runners, batches):
                report(len(order), total, f"round {done + 1}: {runner.runs.given}, batch {batch}")
                order.append((done, batch, runner.runs.given, timing))
                time.sleep(REST)
                runner.run(done, batch, timing)
            done += 1
        rates.measure()
        return BenchmarkRuns(
            engines=engines,
            matmul=rates.measured,
            matmul_size=rates.size,
            rounds=done,
            seconds=clock() - started,
            order=order,
        )


def _round(runners: Sequence[_EngineRunner], batches: Sequence[int]) -> Iterator[tuple[_EngineRunner, int, str]]:
    """The runs of one round; an engine or batch size that is given up during the round is left out from there on."""
    for batch in batches:
        for timing in (BATCH, STAGES):
            for runner in runners:
                if batch in runner.runs.active_batches:
                    yield runner, batch, timing


class _EngineRunner:
    """Drives one engine's process and keeps its times."""

    def __init__(
        self,
        benchmark: EngineBenchmark,
        precision: str,
        batches: Sequence[int],
        stack: contextlib.ExitStack,
        start: StartWorker,
    ) -> None:
        """Start the process and open the engine; FarError where that does not work."""
        self._benchmark = benchmark
        self._stack = stack
        self._start = start
        self._worker = self._new_worker()
        engine = benchmark.engine
        try:
            opened: OpenedEngine = self._worker.call("open")
        except WorkerError as error:
            raise FarError(f"engine {engine.name}: does not open: ", *error.args) from error
        plugin = engine.plugin is not None
        computed_in, note = compute_precision(opened.name, precision, plugin)
        self.runs = EngineRuns(
            given=engine.name,
            opened=opened,
            precision=computed_in,
            note=note,
            plugin=plugin,
            batches={batch: BatchRuns() for batch in batches},
        )

    def warm_up(self, batch: int) -> None:
        """First run of a batch size. A GPU runs it twice: the second run is captured, later ones are replayed."""
        if batch in self.runs.active_batches:
            seconds = self._call(batch, "time_batch")
            if seconds is not None:
                self.runs.batches[batch].first = seconds
            if self.runs.target[0] == GPU and batch in self.runs.active_batches:
                self._call(batch, "time_batch")

    def run(self, done: int, batch: int, timing: str) -> None:
        """One run of the round `done`."""
        runs = self.runs.batches[batch]
        measured = self._call(batch, "time_batch" if timing == BATCH else "time_stages")
        if measured is not None and timing == BATCH:
            runs.whole[done] = measured
        elif measured is not None:
            runs.staged.append(measured)

    def _call(self, batch: int, method: str) -> Any:
        try:
            result = self._worker.call(method, batch)
            self.runs.memory = self._worker.call("peak_memory")
            return result
        except FarError as error:
            self.runs.failure = Message(f"batch {batch}: ", *error.args)
        except WorkerError as error:
            if error.out_of_memory:
                self._skip(batch, error.args[0])
                if error.process_ended:
                    self._restart()
            else:
                self.runs.failure = Message(f"batch {batch}: ", *error.args)
        return None

    def _skip(self, batch: int, reason: str) -> None:
        """Give up this batch size and the larger ones."""
        for size, runs in self.runs.batches.items():
            if size >= batch and not runs.skipped:
                runs.skipped = reason if size == batch else f"batch {batch} did not fit"

    def _restart(self) -> None:
        """Open the engine in a new process, and warm up the batch sizes that were warm."""
        sizes = self.runs.active_batches
        if not sizes:
            return
        self._worker.close()
        self._worker = self._new_worker()
        try:
            self._worker.call("open")
            for size in sizes:
                if self.runs.batches[size].first:
                    self._worker.call("time_batch", size)
        except (FarError, WorkerError) as error:
            self.runs.failure = Message("did not come back after it had run out of memory: ", *error.args)

    def _new_worker(self) -> Worker:
        worker = self._start(self._benchmark)
        self._stack.callback(worker.close)
        return worker


class _MatmulRunner:
    """Measures the machine's matrix products for the targets of all engines, in one process."""

    def __init__(self, matmul: MatmulRate, stack: contextlib.ExitStack, start: StartWorker) -> None:
        self.size, threads = matmul.size, matmul.threads
        self._worker = start(matmul, dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {})
        stack.callback(self._worker.close)
        self.measured: dict[DevicePrecision, dict[str, list[float]]] = {}
        # Without these rates the shares of the machine's rate are left out; everything else can be measured.
        with contextlib.suppress(WorkerError):
            methods = self._worker.call("open")
            self.measured = {target: {name: [] for name in names} for target, names in methods.items()}

    def measure(self) -> None:
        """Measure every method once."""
        if not any(self.measured.values()):
            return
        with contextlib.suppress(WorkerError):
            for target, methods in self._worker.call("measure").items():
                for name, rate in methods.items():
                    self.measured[target][name].append(rate)
