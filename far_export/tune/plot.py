"""The candidates of `far tune` as a picture: arithmetic against distance."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from far_export.tune.run import Tuned
from far_export.tune.search import front
from far_runtime.sampling.presets import LIMITS
from far_runtime.storage.atomic import whole_file

COLOURS = {"ddim": "#5f86b3", "dpmpp-2m": "#0f9aa0", "dpmpp-2m-sde": "#b5546e"}


def save_plot(tuned: Tuned, title: str, path: Path) -> None:
    """Draw and write, whole or not at all."""
    matplotlib: Any = importlib.import_module("matplotlib.figure")
    figure = matplotlib.Figure(figsize=(9, 5), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    for solver, colour in COLOURS.items():
        own = [one for one in tuned.judged.values() if one.settings["solver"] == solver]
        axes.scatter([one.flops / 1e9 for one in own], [one.ratio for one in own], s=16, color=colour, label=solver)
    edge = front(tuned.judged)
    axes.plot([one.flops / 1e9 for one in edge], [one.ratio for one in edge], color="#8a8f98", linewidth=0.8, zorder=0)
    for limit in LIMITS.values():
        axes.axhline(limit, color="#d9a441", linewidth=0.8, linestyle="--")
    places: dict[tuple[float, float], list[str]] = {}
    for name, one in tuned.chosen.items():
        places.setdefault((one.judged.flops / 1e9, one.judged.ratio), []).append(name)
    for at, names in places.items():
        axes.scatter(*at, s=90, facecolors="none", edgecolors="#2f3e52")
        axes.annotate(", ".join(names), at, textcoords="offset points", xytext=(7, 7), fontsize=9)
    axes.axvline(tuned.official_flops / 1e9, color="#2f3e52", linewidth=0.8, linestyle=":")
    axes.annotate("official", (tuned.official_flops / 1e9, 1.02), rotation=90, fontsize=8, ha="right", va="bottom")
    axes.set(xscale="log", xlabel="GFLOP a picture", ylabel="distance, in distances of two official sets")
    ratios = [one.ratio for one in tuned.judged.values()] or [1.0, 2.0]
    axes.set_ylim(0.95 * min(ratios), min(1.03 * max(ratios), 3.0))
    axes.legend(fontsize=8)
    with whole_file(path) as aside:
        figure.savefig(aside, format=path.suffix.lower()[1:])
