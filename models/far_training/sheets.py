"""Pictures of a run: sample sheets, reconstruction sheets and loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from far_runtime.plotting import new_figure, save_figure


def draw_curves(records: Sequence[dict[str, float]], path: Path) -> None:
    """One plot per value over the steps, as a PNG; nothing is written before there are two records."""
    names = [name for name in dict.fromkeys(k for record in records for k in record) if name not in ("step", "minutes")]
    if len(records) < 2:
        return
    columns = 3
    rows = -(-len(names) // columns)
    figure = new_figure(4 * columns, 2.6 * rows, dpi=90)
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        points = [(record["step"], record[name]) for record in records if name in record]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, linewidth=1)
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    save_figure(figure, path)
