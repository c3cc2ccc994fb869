"""Errors per step as an SVG picture, written as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from far_export.verify.results import Report
from far_runtime.sampling.base import Step

WIDTH, HEIGHT = 960, 340
LEFT, RIGHT, TOP, BOTTOM = 66, 18, 44, 46
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
STYLES = ("transformer", "denoise", "loop")
SMALLEST = 1e-12
MARKS = 24  # steps that have room for their number below the plot


@dataclass(frozen=True)
class Series:
    """A line of the plot: a value per step of the loop (None where there is none), and its limit."""

    name: str
    values: tuple[float | None, ...]
    limit: float

    @property
    def style(self) -> str:
        """Class in the style sheet."""
        return self.name if self.name in STYLES else "other"


def series_of(report: Report) -> list[Series]:
    """The worst error of each stage at every step, and the error of the latents of the free run."""
    by_stage: dict[str, dict[int, float]] = {}
    tolerances: dict[str, float] = {}
    for result in report.stages:
        if result.step is not None:
            values = by_stage.setdefault(result.stage, {})
            values[result.step] = max(result.error, values.get(result.step, 0.0))
            tolerances[result.stage] = min(result.tolerance, tolerances.get(result.stage, math.inf))
    steps = range(len(report.plan))
    lines = [Series(name, tuple(v.get(i) for i in steps), tolerances[name]) for name, v in by_stage.items()]
    return [*lines, Series("loop", tuple(result.error for result in report.loop), report.latents_limit)]


@dataclass(frozen=True)
class Axes:
    """Places of steps and errors: a logarithmic scale from 10^bottom to 10^top, with `rim` decades above it for errors
    that are not finite. An error of 0 is drawn at the bottom."""

    steps: int
    bottom: int
    top: int
    rim: int = 0

    def x(self, step: int) -> float:
        """Horizontal place of a step."""
        return LEFT + (WIDTH - LEFT - RIGHT) * (step + 0.5) / self.steps

    def y(self, error: float) -> float:
        """Vertical place of an error."""
        value = self.top + self.rim if math.isinf(error) else math.log10(max(error, SMALLEST))
        share = (max(value, self.bottom) - self.bottom) / (self.top + self.rim - self.bottom)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def axes_of(lines: Sequence[Series]) -> Axes:
    """Whole decades that hold all errors above 0 and all limits, and one more where there are NaN and Inf."""
    errors = [value for line in lines for value in line.values if value is not None]
    values = errors + [line.limit for line in lines]
    powers = [math.log10(max(value, SMALLEST)) for value in values if 0 < value < math.inf]
    return Axes(len(lines[0].values), math.floor(min(powers)), math.floor(max(powers)) + 1, int(math.inf in errors))


def error_plot(report: Report) -> str:
    """An <svg> of the errors per step, with the limits as dashed lines."""
    lines = series_of(report)
    axes = axes_of(lines)
    parts = [*_frame(axes, report.plan), *_limits(axes, lines)]
    for line in reversed(lines):  # the latents below, with a broader stroke: their error often is the last stage's
        parts += _line(axes, line)
    parts += _legend({line.style: line.name for line in lines})
    title = "Relative error of every stage and of the latents at each step, on a logarithmic scale"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def power_of_ten(exponent: int) -> str:
    """10⁻⁴."""
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def _frame(axes: Axes, plan: Sequence[Step]) -> list[str]:
    marks = [(10.0**exponent, power_of_ten(exponent)) for exponent in range(axes.bottom, axes.top + 1)]
    if axes.rim:
        marks.append((math.inf, "NaN, Inf"))
    parts = []
    for error, text in marks:
        y = axes.y(error)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    every = -(-len(plan) // MARKS)
    for step in plan[::every]:
        x, y = axes.x(step.index), HEIGHT - BOTTOM + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{step.number}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{plan[0].kind}, in the order of the loop</text>'
    )
    return parts


def _limits(axes: Axes, lines: Sequence[Series]) -> list[str]:
    """One dashed line for every distinct limit; stages that share one share its line."""
    sharers: dict[float, list[Series]] = {}
    for line in lines:
        if math.isfinite(line.limit):  # else it is not judged
            sharers.setdefault(line.limit, []).append(line)
    parts = []
    for limit, of in sharers.items():
        y = axes.y(limit)
        names = " and ".join("latents" if line.name == "loop" else line.name for line in of)
        style = of[0].style if len(of) == 1 else "shared"
        parts.append(
            f'<line class="limit-line {style}" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
            f'<text x="{WIDTH - RIGHT - 4}" y="{y - 6:.1f}" text-anchor="end">limit of {names}: {limit:.0e}</text>'
        )
    return parts


def _line(axes: Axes, line: Series) -> list[str]:
    points = [(axes.x(i), axes.y(v), v) for i, v in enumerate(line.values) if v is not None]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    parts = [f'<polyline class="series {line.style}" points="{path}"/>']
    for x, y, value in points:
        shown = "NaN or Inf" if math.isinf(value) else f"{value:.2e}"
        title = f"<title>{'latents' if line.name == 'loop' else line.name}: {shown}</title>"
        parts.append(f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>')
    return parts


def _legend(names: Mapping[str, str]) -> list[str]:
    parts, x = [], float(LEFT)
    for style, name in names.items():
        text = "latents of the free run" if name == "loop" else f"{name} (worst call)"
        parts.append(f'<line class="series {style}" x1="{x:.0f}" y1="18" x2="{x + 22:.0f}" y2="18"/>')
        parts.append(f'<circle class="{style}" cx="{x + 11:.0f}" cy="18" r="4"/>')
        parts.append(f'<text x="{x + 30:.0f}" y="22">{text}</text>')
        x += 60 + 6.6 * len(text)
    return parts
