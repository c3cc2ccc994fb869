"""What a run shows while it goes: a live line on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from far_runtime.progress import live_bars

Say = Callable[[str], None]


class ProgressDisplay:
    """The progress of a run: on a terminal one live line (share, step, loss, speed, time left) below what is said,
    elsewhere the lines of the log. As a context it clears the live line away."""

    def __init__(self, say: Say, main: bool, screen: TextIO | None = None) -> None:
        screen = screen or sys.stderr
        self._say: Say = say if main else lambda line: None
        self._bars: Progress | None = None
        self._numbers = ""
        if main and screen.isatty():
            columns = (TaskProgressColumn(), BarColumn(20), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bars = live_bars(*columns, TextColumn("left"), TimeRemainingColumn(), screen=screen)
            self._task = self._bars.add_task("", total=1.0)

    def __enter__(self) -> ProgressDisplay:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bars is not None:
            self._bars.console.print(line, highlight=False, markup=False)
        else:
            self._say(line)

    def at(self, step: int, share: float) -> None:
        """How far the run is; share: from 0 to 1."""
        if self._bars is not None:
            self._bars.update(self._task, completed=share, description=f"step {step}{self._numbers}")

    def log(self, step: int, epoch: float, minutes: float, values: dict[str, float]) -> None:
        """The averages of some steps."""
        if self._bars is None:
            numbers = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._say(f"step {step} epoch {epoch:.1f} {minutes:.1f} min {numbers}")
        else:
            speed = f"{values['pictures_per_second']:.3g} pictures/s"
            self._numbers = f" epoch {epoch:.1f} loss {values['loss']:.4f} {speed}"
