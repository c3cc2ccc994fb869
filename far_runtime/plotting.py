"""Plots: matplotlib figures that are written as PNG or SVG."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from far_runtime.errors import FarError, SettingName
from far_runtime.storage.atomic import whole_file

SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """FarError unless `path` is the name of a PNG or SVG file and matplotlib is installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise FarError(
            f"{path}: a plot is written as PNG or SVG; use ", SettingName("plot"), f" {path.with_suffix('.png')}, say"
        )
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise FarError(SettingName("plot"), " needs matplotlib; install it with: pip install matplotlib") from None


def new_figure(width: float, height: float, dpi: int = 130) -> Any:
    """An empty matplotlib figure of a size in inches, which belongs to no window."""
    matplotlib: Any = importlib.import_module("matplotlib.figure")
    return matplotlib.Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the file's name ends in, whole or not at all."""
    with whole_file(path) as aside:
        figure.savefig(aside, format=path.suffix.lower()[1:])
