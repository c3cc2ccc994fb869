"""The curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from far_runtime.plotting import new_figure, save_figure

COLUMNS = 3
LOG_RATIO = 20
"""Largest over smallest value from which a plot has a logarithmic axis."""


def draw_curves(records: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write a PNG with one plot per value over the steps; nothing is written before there are two records."""
    if len(records) < 2:
        return
    names = [name for name in dict.fromkeys(k for record in records for k in record) if name not in ("step", "minutes")]
    rows = -(-len(names) // COLUMNS)
    figure = new_figure(4 * COLUMNS, 2.6 * rows, dpi=90)
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        points = [(record["step"], record[name]) for record in records if name in record]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, linewidth=1)
        if min(values) > 0 and max(values) > LOG_RATIO * min(values):
            axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    save_figure(figure, path)
