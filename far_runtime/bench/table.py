"""The results of `far bench` as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from far_runtime.bench.results import BatchResult, BenchmarkResult, EngineResult
from far_runtime.errors import Message, Spelling, spelled

UNKNOWN = "-"


def print_result(result: BenchmarkResult, machine: dict[str, Any], console: Console, spelling: Spelling = str) -> None:
    """Print the machine, then tables of engines, of pictures by batch size, and of stages at one batch size.

    spelling: how messages write the names of settings.
    """
    for line in headings(result, machine):
        console.print(line, markup=False, soft_wrap=True)
    for table in (engine_table(result), picture_table(result), stage_table(result)):
        if table is not None:
            console.print()
            console.print(table)
    for line in remarks(result):
        style = "red" if line in result.failures else ""
        console.print(spelled(line, spelling), markup=False, soft_wrap=True, style=style)


def headings(result: BenchmarkResult, machine: dict[str, Any]) -> Iterator[str]:
    """Lines on the machine, its matmul rates and the number of rounds."""
    memory = machine["memory_bytes"]
    parts = [machine["processor"], f"{machine['usable_processors']} processors"]
    parts += [f"{memory / 1e9:.0f} GB"] if memory else []
    parts += [machine["gpu"]["name"]] if machine.get("gpu") else []
    yield ", ".join(parts)
    products = [
        f"{rate.precision} {rate.gflop_per_s:,.0f} GFLOP/s ({rate.method})"
        if rate.device == "cpu"
        else f"{rate.precision} on the {rate.device} {rate.gflop_per_s:,.0f} GFLOP/s ({rate.method})"
        for rate in result.rates
    ]
    size = result.product_size
    yield f"matrix product {size} x {size}: {', '.join(products) or 'nothing here to measure it with'}"
    rounds = f"{result.rounds} round{'s' if result.rounds != 1 else ''} in {result.seconds:.0f} s"
    yield f"{rounds}, the engines in turn; {sum(result.gflop.values()):.3g} GFLOP a picture"


def engine_table(result: BenchmarkResult) -> Table:
    """Load time and memory, a row per engine."""
    gpu = any(engine.device_bytes is not None for engine in result.engines)
    table = _table("Engines", "engine", "version", "multiplies in")
    for heading in ("load s", "peak MB", *(["GPU MB"] if gpu else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for engine in result.engines:
        row = [engine.engine, engine.version, engine.precision, _number(engine.load_s), _megabytes(engine.peak_bytes)]
        table.add_row(*row, *([_megabytes(engine.device_bytes)] if gpu else []))
    return table


def picture_table(result: BenchmarkResult) -> Table:
    """Times of whole batches, a row per batch size and engine."""
    table = _table("Pictures", "batch", "engine")
    for heading in ("p50 s", "p95 s", "n", "pictures/s", "speed", "(range)", "GFLOP/s", "of machine"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i in range(max((len(engine.batches) for engine in result.engines), default=0)):
        for j, engine in enumerate(result.engines):
            batch = engine.batches[i]
            last = j == len(result.engines) - 1
            table.add_row("" if j else str(batch.batch), engine.engine, *_batch_cells(batch), end_section=last)
    return table


def _batch_cells(batch: BatchResult) -> list[str | Text]:
    if batch.p50_s is None:
        return [Text("failed" if batch.skipped == "not measured" else "skipped", "yellow")]
    ratio = batch.ratio
    return [
        _number(batch.p50_s),
        _number(batch.p95_s),
        str(len(batch.seconds)),
        _number(batch.pictures_per_s),
        f"{ratio.median:.2f}" if ratio else UNKNOWN,
        f"{ratio.low:.2f}-{ratio.high:.2f}" if ratio else UNKNOWN,
        _rate(batch.gflop_per_s),
        _percent(batch.rate_share),
    ]


def stage_table(result: BenchmarkResult) -> Table | None:
    """Times by stage at one batch size, a row per stage and engine; None where no stages were timed."""
    shown = at_one_batch(result)
    if not shown:
        return None
    table = _table(f"Stages, batch {shown[0][1].batch}", "stage", "engine")
    for heading in ("calls", "p50 ms", "p95 ms", "s a batch", "share", "GFLOP/s", "of machine"):
        table.add_column(heading, justify="right", no_wrap=True)
    names = list(dict.fromkeys(stage.stage for _, batch in shown for stage in batch.stages))
    for name in names:
        rows = [(engine, stage) for engine, batch in shown for stage in batch.stages if stage.stage == name]
        for i, (engine, stage) in enumerate(rows):
            table.add_row(
                "" if i else name, engine.engine, str(stage.calls), _number(1e3 * stage.p50_s),
                _number(1e3 * stage.p95_s), _number(stage.seconds), _percent(stage.time_share),
                _rate(stage.gflop_per_s), _percent(stage.rate_share), end_section=i == len(rows) - 1,
            )  # fmt: skip
    return table


def at_one_batch(result: BenchmarkResult) -> list[tuple[EngineResult, BatchResult]]:
    """The engines at one batch size: of those with times by stage for the most engines, the largest."""
    by_size: dict[int, list[tuple[EngineResult, BatchResult]]] = {}
    for engine in result.engines:
        for batch in engine.batches:
            if batch.stages:
                by_size.setdefault(batch.batch, []).append((engine, batch))
    best = max(by_size, key=lambda size: (len(by_size[size]), size), default=0)
    return by_size.get(best, [])


def remarks(result: BenchmarkResult) -> list[str]:
    """Lines below the tables: what speed refers to, notes on precisions, and what was given up and why."""
    notes = [f"{engine.engine}: {engine.note}" for engine in result.engines if engine.note]
    skipped = [
        Message(f"{engine.engine}, batch {batch.batch}: skipped: ", batch.skipped)
        for engine in result.engines
        for batch in engine.batches
        if batch.skipped and not engine.failure
    ]
    speed = f"speed: as fast as {result.baseline}, in runs of the same round" if len(result.engines) > 1 else ""
    return [*([speed] if speed else []), *notes, *skipped, *result.failures]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _megabytes(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value / 1e6:,.0f}"


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"
