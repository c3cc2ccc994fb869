"""The candidates of `far tune` as a plot: FLOPs against distance."""

from __future__ import annotations

from pathlib import Path

from far_export.tune.run import TuneResult
from far_export.tune.search import front
from far_runtime.plotting import new_figure, save_figure
from far_runtime.sampling.presets import LIMITS

COLOURS = {"ddim": "#5f86b3", "dpmpp-2m": "#0f9aa0", "dpmpp-2m-sde": "#b5546e"}


def save_plot(result: TuneResult, title: str, path: Path) -> None:
    """Write a PNG or SVG file: candidates, their Pareto front, the limits and the chosen presets."""
    figure = new_figure(9, 5)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    candidates = list(result.candidates.values())
    for solver, colour in COLOURS.items():
        points = [(c.flops / 1e9, c.ratio) for c in candidates if c.settings["solver"] == solver]
        axes.scatter([x for x, _ in points], [y for _, y in points], s=16, color=colour, label=solver)
    edge = front(result.candidates)
    axes.plot([c.flops / 1e9 for c in edge], [c.ratio for c in edge], color="#8a8f98", linewidth=0.8, zorder=0)
    for limit in LIMITS.values():
        axes.axhline(limit, color="#d9a441", linewidth=0.8, linestyle="--")
    names: dict[tuple[float, float], list[str]] = {}
    for name, preset in result.chosen.items():
        names.setdefault((preset.candidate.flops / 1e9, preset.candidate.ratio), []).append(name)
    for point, presets in names.items():
        axes.scatter(*point, s=90, facecolors="none", edgecolors="#2f3e52")
        axes.annotate(", ".join(presets), point, textcoords="offset points", xytext=(7, 7), fontsize=9)
    axes.axvline(result.official_flops / 1e9, color="#2f3e52", linewidth=0.8, linestyle=":")
    axes.annotate("official", (result.official_flops / 1e9, 1.02), rotation=90, fontsize=8, ha="right", va="bottom")
    axes.set(xscale="log", xlabel="GFLOP a picture", ylabel="distance, in distances of two official sets")
    ratios = [candidate.ratio for candidate in candidates] or [1.0, 2.0]
    axes.set_ylim(0.95 * min(ratios), min(1.03 * max(ratios), 3.0))
    axes.legend(fontsize=8)
    save_figure(figure, path)
