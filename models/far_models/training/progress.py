"""What a run shows while it goes: a live line on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

Say = Callable[[str], None]


class Shown:
    """The progress of a run: on a terminal one live line (share, step, loss, speed, time left) below what is said,
    elsewhere the lines of the log. As a context it clears the live line away."""

    def __init__(self, say: Say, main: bool) -> None:
        self._say = say if main else lambda line: None
        self._bars: Any = None
        self._task: Any = None
        if main and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bars.add_task("", total=1.0)

    def __enter__(self) -> Shown:
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

    def log(self, step: int, epoch: float, minutes: float, share: float, values: dict[str, float]) -> None:
        """The averages of some steps; share: of the run, from 0 to 1."""
        if self._bars is None:
            numbers = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._say(f"step {step} epoch {epoch:.1f} {minutes:.1f} min {numbers}")
            return
        line = f"step {step} loss {values['loss']:.4f} {values['pictures_per_second']:.0f} pictures/s"
        self._bars.update(self._task, completed=share, description=line)
