"""A plot of the results of `far bench`: pictures per second by batch size, and milliseconds per stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from far_runtime.bench.results import HOST, BenchmarkResult
from far_runtime.bench.table import at_one_batch
from far_runtime.engines.timed import COPIES
from far_runtime.plotting import new_figure, save_figure

ENGINE_COLOURS = ("#2f3e52", "#5f86b3", "#0f9aa0", "#7fb069", "#d9a441", "#b5546e", "#8a8f98", "#6b4e9b")
STAGE_COLOURS = {
    "transformer": "#2463c9",
    "denoise": "#e08a3c",
    "decode": "#7a3fb8",
    COPIES: "#b9c2cd",
    HOST: "#dfe4ea",
}
OTHER_COLOURS = ("#0f9aa0", "#5b8c2a", "#b3261e", "#8a6d3b", "#3b4a5e")


def save_plot(result: BenchmarkResult, title: str, path: Path) -> None:
    """Draw the plot and write it atomically; ValueError where nothing was measured."""
    measured = at_one_batch(result)
    if not measured:
        raise ValueError("no engine was measured")
    figure = new_figure(11, 1.4 + max(3.2, 0.62 * len(measured) + 1.4))
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _rates(left, result)
    _stages(right, result)
    save_figure(figure, path)


def _rates(axes: Any, result: BenchmarkResult) -> None:
    """Bars of pictures per second, a group per batch size."""
    engines = [engine for engine in result.engines if any(batch.pictures_per_s for batch in engine.batches)]
    sizes = list(dict.fromkeys(batch.batch for engine in engines for batch in engine.batches))
    width = 0.84 / len(engines)
    for i, engine in enumerate(engines):
        batches = [(sizes.index(batch.batch), batch) for batch in engine.batches if batch.pictures_per_s]
        x = [group + (i - (len(engines) - 1) / 2) * width for group, _ in batches]
        y = [batch.pictures_per_s or 0.0 for _, batch in batches]
        slowest = [rate - batch.batch / (batch.p95_s or 1) for rate, (_, batch) in zip(y, batches, strict=True)]
        bars = axes.bar(x, y, width * 0.94, color=ENGINE_COLOURS[i % len(ENGINE_COLOURS)], label=engine.engine)
        axes.errorbar(x, y, [slowest, [0.0] * len(y)], fmt="none", ecolor="#1b2430", elinewidth=1, capsize=2)
        axes.bar_label(bars, [f"{rate:.3g}" for rate in y], fontsize=7.5, padding=2)
    axes.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.set_title("pictures a second (whisker: at the 95th percentile of time)", fontsize=10, loc="left")
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.08), ncols=3)
    _bare_axes(axes, "y")


def _stages(axes: Any, result: BenchmarkResult) -> None:
    """Stacked bars of milliseconds per picture by stage, a row per engine."""
    shown = at_one_batch(result)
    names = list(dict.fromkeys(stage.stage for _, batch in shown for stage in batch.stages))
    others = iter(OTHER_COLOURS * len(names))
    colours = {name: STAGE_COLOURS.get(name) or next(others) for name in names}
    rows = [len(shown) - 1 - i for i in range(len(shown))]  # the first on top
    offsets = [0.0] * len(shown)
    for name in names:
        widths = [
            sum(1e3 * stage.seconds / batch.batch for stage in batch.stages if stage.stage == name)
            for _, batch in shown
        ]
        axes.barh(rows, widths, 0.62, left=offsets, color=colours[name], label=name)
        offsets = [offset + width for offset, width in zip(offsets, widths, strict=True)]
    for row, offset in zip(rows, offsets, strict=True):
        axes.text(offset, row, f" {offset:,.0f} ms" if offset >= 10 else f" {offset:.2g} ms", va="center", fontsize=8)
    axes.set_yticks(rows, [engine.engine for engine, _ in shown])
    axes.set_title(f"milliseconds a picture, batch {shown[0][1].batch}", fontsize=10, loc="left")
    axes.margins(x=0.16)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.08), ncols=4)
    _bare_axes(axes, "x")


def _bare_axes(axes: Any, values: str) -> None:
    """Remove the frame and draw light lines behind the bars."""
    axes.spines[["top", "right", "left" if values == "y" else "bottom"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    axes.grid(axis=values, color="#e3e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
