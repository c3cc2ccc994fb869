"""Progress of long work, on standard error: live bars on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

import click

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn

    from far_runtime.generation import OnProgress, Progress

Reporting = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Opens a report by its title and the number of units of work; the context yields a function that takes how many of
them are done."""


class Update(Protocol):
    """Moves a bar."""

    def __call__(self, done: int, total: int | None, title: str | None = None) -> None:
        """Show `done` of `total` units of work (None: not known yet), and a new title where there is one."""


@contextmanager
def silent(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A report that shows nothing."""
    yield lambda done: None


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A report that is a bar on a terminal, and a line for every tenth of the work elsewhere."""
    from rich.console import Console

    tenths = 0

    def print_tenth(done: int) -> None:
        nonlocal tenths
        if 10 * done // total > tenths:
            tenths = 10 * done // total
            say(f"{title}: {done} of {total}")

    with progress_bar(Console(stderr=True).is_terminal, title, total) as update:
        yield print_tenth if update is None else lambda done: update(done, total)


@contextmanager
def progress_bar(
    show: bool, title: str = "", total: int | None = None, elapsed: bool = False
) -> Iterator[Update | None]:
    """One bar with title, count and time left, or time passed if `elapsed`; None unless `show`."""
    if not show:
        yield None
        return
    with live_bars(elapsed=elapsed) as bars:
        task = bars.add_task(title, total=total)
        yield lambda done, total, title=None: bars.update(task, completed=done, total=total, description=title)


@contextmanager
def generation_bars(show: bool) -> Iterator[OnProgress | None]:
    """Two bars, one over a whole generation and one over the current step of its loop; None unless `show`."""
    if not show:
        yield None
        return
    with live_bars() as bars:
        whole = bars.add_task("all", total=None)
        level = bars.add_task("", total=None)

        def update(at: Progress) -> None:
            of_batches = f", batch {at.batch + 1} of {at.batches}" if at.batches > 1 else ""
            name = f"{at.step.name} ({at.step.index + 1} of {at.steps}{of_batches})"
            bars.update(whole, completed=at.done, total=at.total)
            bars.update(level, completed=at.inner, total=at.step.substeps, description=name)

        yield update


def live_bars(*columns: ProgressColumn, elapsed: bool = False, screen: TextIO | None = None) -> Bars:
    """Bars that are erased at the end: title, bar, count and time, unless `columns` are others."""
    # Imported here because this module is part of every command's start.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    clock = TimeElapsedColumn() if elapsed else TimeRemainingColumn()
    columns = columns or (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), clock)
    return Bars(*columns, console=Console(file=screen) if screen else Console(stderr=True), transient=True)


def say(line: str) -> None:
    """Print a line on standard error, apart from a command's results."""
    click.echo(line, err=True)
