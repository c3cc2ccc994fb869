"""How far long work is, for the user to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import click

Reporting = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Opens a report on long work by its title and its size; what it gives is told how much of it is done."""


@contextmanager
def silent(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A report that nobody reads."""
    yield lambda done: None


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere a line for every tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        told = 0

        def line(done: int) -> None:
            nonlocal told
            if 10 * done // total > told:
                told = 10 * done // total
                say(f"{title}: {done} of {total}")

        yield line
        return
    columns = (TextColumn(title, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=total)
        yield lambda done: bars.update(task, completed=done)


def say(line: str) -> None:
    """A line beside the figures."""
    click.echo(line, err=True)
