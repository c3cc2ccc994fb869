"""Pictures of a run: sample sheets, reconstruction sheets and loss curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def tile(pictures: NDArray[np.uint8], columns: int, gap: int = 2) -> NDArray[np.uint8]:
    """One picture of pictures [N, H, W, 3] in reading order, `gap` grey pixels around each; [rows, columns, 3]."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 160, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def save_picture(picture: NDArray[np.uint8], path: Path) -> None:
    """Write a picture [H, W, 3] whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    Image.fromarray(picture).save(part, quality=90)  # of WebP; PNG has none
    os.replace(part, path)


def to_pixels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 [N, H, W, 3] of pictures [N, 3, H, W] in [-1, 1]."""
    rounded = np.rint(np.clip(values, -1, 1) * 127.5 + 127.5)
    return rounded.astype(np.uint8).transpose(0, 2, 3, 1)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean over pictures [N, H, W, 3] of the peak signal-to-noise ratio in dB."""
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-10))).mean())


def draw_curves(records: Sequence[dict[str, float]], path: Path) -> None:
    """One plot per value over the steps, as a PNG; nothing is written before there are two records."""
    names = [name for name in dict.fromkeys(k for record in records for k in record) if name not in ("step", "minutes")]
    if len(records) < 2:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 3
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
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
    part = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(part, dpi=90)
    os.replace(part, path)
