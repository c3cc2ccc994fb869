"""What a run shows while it goes on: a live line on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from far_runtime.progress import live_bars

Log = Callable[[str], None]
"""Takes a line of text, to print it or to write it to a log."""


class ProgressDisplay:
    """The progress of a run, as a context that clears its live line away at the end.

    On a terminal there is one live line (share, step, loss, speed, time left) below the log lines. Elsewhere there are
    log lines only.
    """

    def __init__(self, log: Log, is_main: bool, screen: TextIO | None = None) -> None:
        """Show progress in the main process, and nothing in the others. screen: standard error by default."""
        screen = screen or sys.stderr
        self._log: Log = log if is_main else lambda line: None
        self._bars: Progress | None = None
        self._numbers = ""
        if is_main and screen.isatty():
            columns = (TaskProgressColumn(), BarColumn(20), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bars = live_bars(*columns, TextColumn("left"), TimeRemainingColumn(), screen=screen)
            self._task = self._bars.add_task("", total=1.0)

    def __enter__(self) -> ProgressDisplay:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def log(self, line: str) -> None:
        """Print a line that stays."""
        if self._bars is not None:
            self._bars.console.print(line, highlight=False, markup=False)
        else:
            self._log(line)

    def update(self, step: int, share: float) -> None:
        """Show how far the run is; `share` is from 0 to 1."""
        if self._bars is not None:
            self._bars.update(self._task, completed=share, description=f"step {step}{self._numbers}")

    def log_metrics(self, step: int, epoch: float, minutes: float, values: Mapping[str, float]) -> None:
        """Show the mean values of the last steps."""
        if self._bars is None:
            numbers = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._log(f"step {step} epoch {epoch:.1f} {minutes:.1f} min {numbers}")
        else:
            speed = f"{values['pictures_per_second']:.3g} pictures/s"
            self._numbers = f" epoch {epoch:.1f} loss {values['loss']:.4f} {speed}"
