"""Timing for the scripts of this folder: median seconds over interleaved rounds, and a Markdown table of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import click

Name = TypeVar("Name", bound=Hashable)


def median_seconds(functions: Mapping[Name, Callable[[], Any]], rounds: int) -> dict[Name, float]:
    """Median seconds of each function; every round runs one after the other, and a first round is not counted."""
    seconds: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def print_ratios(title: str, seconds: Mapping[str, float]) -> None:
    """Print a Markdown table of seconds and their ratios to the first row."""
    first = next(iter(seconds.values()))
    click.echo(f"\n{title}\n\n| | seconds | ratio |\n| --- | --- | --- |")
    for name, value in seconds.items():
        click.echo(f"| {name} | {value:.3f} | {value / first:.2f} |")
