"""The speed ledger as a picture: seconds of one picture on a logarithmic axis, a group of bars for every system.

    python scripts/bench/ledger_plot.py LEDGER.json [LEDGER.json ...] FILE.png

LEDGER.json is a file that scripts/bench_ledger.py --json has written. Of a system in several files the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from far_runtime.cli.option_names import with_options
from far_runtime.errors import FarError
from far_runtime.plotting import check_plot, new_figure, save_figure

SYSTEMS = ("far-b", "far-l", "far-h", "mar-b", "var-d16")
COLOURS = {
    "released, fp32": "#2f3e52",
    "released, bf16": "#5f7893",
    "released, compile": "#9aa9b9",
    "ours, official": "#6b4e9b",
    "ours, quality": "#2463c9",
    "ours, balanced": "#0f9aa0",
    "ours, fast": "#7fb069",
}


def bars_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Seconds per picture by bar, in the order of COLOURS; of far-deploy one at a time with the best bundle."""
    seconds = {f"released, {name}": float(timed["seconds"]) for name, timed in report["released"].items()}
    for row in report["rows"]:
        name = f"ours, {row['preset']}"
        if row["batch"] == 1:
            seconds[name] = min(seconds.get(name, float("inf")), float(row["seconds"]))
    return {name: seconds[name] for name in COLOURS if name in seconds}


def read_ledgers(paths: Sequence[Path]) -> dict[str, Any]:
    """The systems of all ledgers, in the order of SYSTEMS; FarError for a file that is not a ledger."""
    reports: dict[str, Any] = {}
    for path in paths:
        try:
            read = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise FarError(f"{path}: cannot be read as JSON ({error}); bench_ledger.py --json writes one") from None
        if not isinstance(read, dict) or not any(name in read for name in SYSTEMS):
            raise FarError(f"{path}: has none of {', '.join(SYSTEMS)}; give what bench_ledger.py --json wrote")
        reports |= read
    return {name: reports[name] for name in SYSTEMS if name in reports}


def save_plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the chart and write it atomically; FarError where matplotlib is missing or `path` is no PNG or SVG."""
    check_plot(path)
    systems = [(name, result[name]) for name in SYSTEMS if name in result]
    figure = new_figure(11, 4.6)
    axes = figure.subplots()
    width, shown = 0.86 / len(COLOURS), set()
    for group, (_, report) in enumerate(systems):
        bars = bars_of(report)
        for i, (name, seconds) in enumerate(bars.items()):
            x = group + (i - (len(bars) - 1) / 2) * width
            label = None if name in shown else name
            shown.add(name)
            (bar,) = axes.bar([x], [seconds], width * 0.92, color=COLOURS[name], label=label)
            axes.annotate(
                f"{seconds:.3g}", (x, bar.get_height()), (0, 2), textcoords="offset points", ha="center", fontsize=7
            )
    axes.set_yscale("log")
    axes.margins(y=0.12)
    ticks = [f"{name}\n{report['ratio']:.1f} x ({report['preset']})" for name, report in systems]
    axes.set_xticks(range(len(systems)), ticks, fontsize=9)
    axes.set_title("seconds a picture, one at a time (logarithmic)", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = [name for name in COLOURS if name in handles]
    axes.legend([handles[name] for name in order], order, frameon=False, fontsize=8, ncols=len(order),
                loc="upper center", bbox_to_anchor=(0.5, -0.14))  # fmt: skip
    save_figure(figure, path)


@click.command(help=__doc__)
@click.argument("ledgers", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
def main(ledgers: tuple[Path, ...], output: Path) -> None:
    try:
        save_plot(read_ledgers(ledgers), output)
    except FarError as error:
        raise click.ClickException(with_options(error)) from None


if __name__ == "__main__":
    main()
