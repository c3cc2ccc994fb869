"""Errors by step as an SVG inside of a page, in the page's colours for light and dark."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from html import escape
from typing import Any

from far_export.verify.results import Report

# Matplotlib draws in these colours; in the SVG each becomes the CSS variable of that name.
COLOURS = {
    "transformer": "#2463c9",
    "denoise": "#c2570c",
    "latents": "#7a3fb8",
    "other": "#0f7c80",
    "soft": "#5d6b7c",
    "line": "#dfe4ea",
    "card": "#ffffff",
}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SMALLEST = 1e-12
MAX_TICKS = 24
"""Steps that have room for their number below the plot."""
DESCRIPTION = "Relative error of every stage and of the latents at each step, on a logarithmic scale"


@dataclass(frozen=True)
class Series:
    """One line of the plot."""

    name: str
    """The stage, or "latents"."""
    errors: dict[int, float]
    """Relative error by the index of the step."""
    limit: float
    """The largest error that is accepted; infinite where there is no limit."""

    @property
    def colour(self) -> str:
        """Name of its colour."""
        return self.name if self.name in COLOURS else "other"


def series_of(report: Report) -> list[Series]:
    """The worst error of each stage at every step, and the error of the latents of the free run."""
    stages: dict[str, Series] = {}
    for result in report.stages:
        if result.step is not None:
            series = stages.get(result.stage, Series(result.stage, {}, math.inf))
            worst = max(result.error, series.errors.get(result.step, 0.0))
            limit = min(result.tolerance, series.limit)
            stages[result.stage] = Series(result.stage, {**series.errors, result.step: worst}, limit)
    latents = {result.step: result.error for result in report.loop}
    return [*stages.values(), Series("latents", latents, report.latents_limit)]


@dataclass(frozen=True)
class Decades:
    """The range of the error axis, in powers of ten."""

    bottom: int
    top: int
    has_infinite: bool
    """Whether there is one more decade at the top, for NaN and infinite errors."""

    @staticmethod
    def of(lines: list[Series]) -> Decades:
        """Whole decades that hold all errors above 0 and all limits."""
        errors = [error for line in lines for error in line.errors.values()]
        powers = [
            math.log10(max(value, SMALLEST))
            for value in errors + [line.limit for line in lines]
            if 0 < value < math.inf
        ]
        return Decades(math.floor(min(powers)), math.floor(max(powers)) + 1, math.inf in errors)

    def place(self, error: float) -> float:
        """Where an error is drawn: 0 at the bottom, NaN and infinity above every other."""
        return 10.0 ** (self.top + 1) if math.isinf(error) else max(error, 10.0**self.bottom)


def error_plot(report: Report) -> str:
    """An <svg> of the errors by step, with the limits as dashed lines; "" where matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    lines = series_of(report)
    decades = Decades.of(lines)
    titles: dict[str, str] = {}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "far", "font.size": 9}):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        axes = figure.subplots()
        # The latents below the stages and with a broader line: their error often is the last stage's.
        for line in reversed(lines):
            titles |= _draw_series(axes, line, decades)
        _draw_limits(axes, lines, decades)
        _draw_axes(axes, report, decades)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="outside upper left", ncols=len(lines), frameon=False,
            labelcolor=COLOURS["soft"],
        )  # fmt: skip
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return _inline(file.getvalue(), titles)


def _draw_series(axes: Any, line: Series, decades: Decades) -> dict[str, str]:
    """Draw a line with a marker at every step; returns the markers' titles by the ids of their SVG groups."""
    colour = COLOURS[line.colour]
    style = {"color": colour, "markerfacecolor": COLOURS["card"], "markersize": 5, "markeredgewidth": 1.5}
    label = "latents of the free run" if line.name == "latents" else f"{line.name} (worst call)"
    steps, places = list(line.errors), [decades.place(error) for error in line.errors.values()]
    axes.plot(steps, places, label=label, linewidth=3 if line.name == "latents" else 1.5, marker="o", **style)
    titles = {}
    for step, place, error in zip(steps, places, line.errors.values(), strict=True):
        group = f"{line.name}-{step}"
        axes.plot([step], [place], marker="o", gid=group, **style)
        titles[group] = f"{line.name}: {'NaN or Inf' if math.isinf(error) else f'{error:.2e}'}"
    return titles


def _draw_limits(axes: Any, lines: list[Series], decades: Decades) -> None:
    """One dashed line for every distinct limit; stages with the same limit share it."""
    for limit in dict.fromkeys(line.limit for line in lines if math.isfinite(line.limit)):
        sharing = [line for line in lines if line.limit == limit]
        colour = COLOURS[sharing[0].colour if len(sharing) == 1 else "soft"]
        place = decades.place(limit)
        axes.axhline(place, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        text = f"limit of {' and '.join(line.name for line in sharing)}: {limit:.0e}"
        axes.annotate(
            text, (1, place), xycoords=axes.get_yaxis_transform(), xytext=(0, 3), textcoords="offset points",
            ha="right", color=COLOURS["soft"],
        )  # fmt: skip


def _draw_axes(axes: Any, report: Report, decades: Decades) -> None:
    plan = report.plan
    ticks = {10.0**power: power_of_ten(power) for power in range(decades.bottom, decades.top + 1)}
    if decades.has_infinite:
        ticks[decades.place(math.inf)] = "NaN, Inf"
    axes.set(yscale="log", ylim=(min(ticks), max(ticks)), xlim=(-0.5, len(plan) - 0.5))
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    shown = plan[:: -(-len(plan) // MAX_TICKS)]
    axes.set_xticks([step.index for step in shown], [str(step.number) for step in shown])
    axes.set_xlabel(f"{plan[0].kind}, in the order of the loop", color=COLOURS["soft"])
    axes.tick_params(length=0, pad=7, labelcolor=COLOURS["soft"])
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _inline(svg: str, titles: dict[str, str]) -> str:
    """An SVG file as an element of a page: without links to name spaces, with titles that show on hovering."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| clip-path="[^"]*"', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{DESCRIPTION}"', 1)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    for group, title in titles.items():
        svg = svg.replace(f'<g id="{group}">', f'<g id="{group}"><title>{escape(title)}</title>')
    return svg


def power_of_ten(exponent: int) -> str:
    """A power of ten with a raised exponent, as in 10⁻⁴."""
    return "10" + str(exponent).translate(SUPERSCRIPTS)
