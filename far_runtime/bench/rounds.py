"""Engines in turn: every round draws each batch size on one engine after the other, so that a machine which slows down
or speeds up does so for all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from far_runtime.bench.contenders import GPU, computed_in, device_of
from far_runtime.bench.matmul_rate import Kind, MatmulRate
from far_runtime.bench.session import EngineSession, Memory, Opened, Staged
from far_runtime.bench.worker_process import Failed, Worker
from far_runtime.errors import FarError, Message

REST = 0.25
"""Seconds between two engines, for the threads of the last one to go to sleep: ONNX Runtime's were seen to spin for
0.2 s after a run."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

OnProgress = Callable[[int, int | None, str], None]
"""Called with the number of runs done, their total (None: not known) and what comes next."""


@dataclass(frozen=True)
class Length:
    """How long to go on: so many rounds, or as many as are begun within so many seconds (at least one)."""

    rounds: int | None = 10
    seconds: float | None = None

    def goes_on(self, done: int, seconds: float) -> bool:
        """Whether another round is to follow."""
        if self.seconds is not None:
            return done == 0 or seconds < self.seconds
        return done < (self.rounds or 1)


@dataclass
class BatchRuns:
    """What was measured of one engine at one batch size: seconds of its first run, then a run whole and a run by stages
    of every round. skipped: why it was given up."""

    first: float = 0.0
    whole: dict[int, float] = field(default_factory=dict)
    staged: list[Staged] = field(default_factory=list)
    skipped: str = ""


@dataclass
class EngineRuns:
    """What was measured of one engine. failure: why it was given up, with what it had done until then."""

    given: str
    opened: Opened
    precision: str
    note: str
    plugin: bool
    batches: dict[int, BatchRuns]
    memory: Memory = field(default_factory=Memory)
    failure: str = ""

    @property
    def kind(self) -> Kind:
        """Where and in which precision it multiplies."""
        return device_of(self.opened.name), self.precision


@dataclass(frozen=True)
class Runs:
    """Everything that was measured. products: operations a second of the matrix products of so many rows and columns,
    by kind, method and round.
    order: (round, batch, engine, what) of every run, in the order in which they were made."""

    engines: list[EngineRuns]
    products: dict[Kind, dict[str, list[float]]]
    product_size: int
    rounds: int
    seconds: float
    order: list[tuple[int, int, str, str]]


def measure(
    sessions: Sequence[EngineSession],
    precision: str,
    batches: Sequence[int],
    length: Length,
    products: Callable[[tuple[Kind, ...]], MatmulRate],
    on_progress: OnProgress | None = None,
    start: Callable[..., Worker] = Worker,
    clock: Callable[[], float] = time.monotonic,
) -> Runs:
    """Open all engines, draw with each at every batch size once to warm up, then round by round.

    precision: the bundle's. An engine that cannot be opened is an error (FarError) before anything is measured. One
    that fails later is given up and the others go on; a batch size that it has no memory for is skipped, and so are the
    larger ones. start, clock: for tests.
    """
    with contextlib.ExitStack() as stack:
        turns = [_Turns(session, stack, start) for session in sessions]
        report = on_progress or (lambda done, total, what: None)
        engines = []
        for one in turns:
            report(0, None, f"open {one.session.contender.name}")
            engines.append(one.open(precision, batches))
        rates = _Rates(engines, products, stack, start)
        for batch in sorted(batches):
            for one in turns:
                report(0, None, f"warm up {one.runs.given}, batch {batch}")
                one.first(batch)
        order: list[tuple[int, int, str, str]] = []
        done, started = 0, clock()
        per_round = 2 * sum(len(one.going()) for one in turns)
        total = None if length.seconds is not None else per_round * (length.rounds or 1)
        while length.goes_on(done, clock() - started) and any(one.going() for one in turns):
            rates.measure()
            for batch in batches:
                for what in ("whole", "stages"):
                    for one in turns:
                        if batch in one.going():
                            report(len(order), total, f"round {done + 1}: {one.runs.given}, batch {batch}")
                            order.append((done, batch, one.runs.given, what))
                            time.sleep(REST)
                            one.run(done, batch, what)
            done += 1
        rates.measure()
        for one in turns:
            one.close()
        return Runs(engines, rates.measured, rates.size, done, clock() - started, order)


class _Turns:
    """One engine's process and what it has been measured to take."""

    runs: EngineRuns

    def __init__(self, session: EngineSession, stack: contextlib.ExitStack, start: Callable[..., Worker]) -> None:
        self.session = session
        self._stack = stack
        self._start = start
        self._worker: Worker = self._new()

    def open(self, precision: str, batches: Sequence[int]) -> EngineRuns:
        """Open the engine; FarError where that does not work."""
        contender = self.session.contender
        try:
            opened: Opened = self._worker.call("open")
        except Failed as failure:
            raise FarError(f"engine {contender.name}: does not open: ", *failure.args) from failure
        plugin = contender.plugin is not None
        computes, note = computed_in(opened.name, precision, plugin)
        self.runs = EngineRuns(
            contender.name, opened, computes, note, plugin, {batch: BatchRuns() for batch in batches}
        )
        return self.runs

    def going(self) -> list[int]:
        """The batch sizes that are still measured."""
        if self.runs.failure:
            return []
        return [batch for batch, runs in self.runs.batches.items() if not runs.skipped]

    def first(self, batch: int) -> None:
        """The first run of a batch size: graphs are loaded or compiled, and nothing is cached yet."""
        if batch in self.going():
            seconds = self._call(batch, "whole")
            if seconds is not None:
                self.runs.batches[batch].first = seconds
            if self.runs.kind[0] == GPU and batch in self.going():  # the second is captured, later ones are replayed
                self._call(batch, "whole")

    def run(self, done: int, batch: int, what: str) -> None:
        """One run of a round."""
        if what == "whole":
            seconds = self._call(batch, "whole")
            if seconds is not None:
                self.runs.batches[batch].whole[done] = seconds
            return
        staged = self._call(batch, "staged")
        if staged is not None:
            self.runs.batches[batch].staged.append(staged)

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def _call(self, batch: int, method: str) -> Any:
        try:
            answer = self._worker.call(method, batch)
            self.runs.memory = self._worker.call("memory")
            return answer
        except FarError as error:
            self.runs.failure = Message(f"batch {batch}: ", *error.args)
        except Failed as failure:
            if failure.memory:
                self._skip(batch, failure.args[0], failure.dead)
            else:
                self.runs.failure = Message(f"batch {batch}: ", *failure.args)
        return None

    def _skip(self, batch: int, reason: str, dead: bool) -> None:
        for size, runs in self.runs.batches.items():
            if size >= batch and not runs.skipped:
                runs.skipped = reason if size == batch else f"batch {batch} did not fit"
        if dead and (sizes := self.going()):
            self._worker.close()
            self._worker = self._new()
            try:
                self._worker.call("open")
                for size in sizes:
                    if self.runs.batches[size].first:  # had been warmed up
                        self._worker.call("whole", size)
            except (FarError, Failed) as error:
                self.runs.failure = Message("did not come back after it had run out of memory: ", *error.args)

    def _new(self) -> Worker:
        worker = self._start(self.session)
        self._stack.callback(worker.close)
        return worker


class _Rates:
    """The matrix products of all kinds that the engines compute in, in a process of their own."""

    def __init__(
        self,
        engines: Sequence[EngineRuns],
        products: Callable[[tuple[Kind, ...]], MatmulRate],
        stack: contextlib.ExitStack,
        start: Callable[..., Worker],
    ) -> None:
        session = products(tuple(dict.fromkeys(engine.kind for engine in engines)))
        self.size, threads = session.size, session.threads
        self._worker = start(session, dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {})
        stack.callback(self._worker.close)
        self.measured: dict[Kind, dict[str, list[float]]] = {}
        with contextlib.suppress(Failed):  # then there is nothing to hold the engines against, and that is all
            methods = self._worker.call("open")
            self.measured = {kind: {name: [] for name in names} for kind, names in methods.items()}

    def measure(self) -> None:
        """One round of all."""
        if not any(self.measured.values()):
            return
        with contextlib.suppress(Failed):
            for kind, methods in self._worker.call("measure").items():
                for name, rate in methods.items():
                    self.measured[kind][name].append(rate)
