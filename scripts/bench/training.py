"""Costs of training at ImageNet's size besides the network, and the arithmetic and memory of one step.

    python scripts/bench/training.py [--files 100000] [--rows 20000] [--preset far-b --batch 8]

Timed are opening and decoding pictures, the order of an epoch, random numbers, and reading cached latents. The data is
made in a temporary folder: empty files with the names of pictures, and shards of random latents of 256 px pictures.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from far_models.far import PRESETS
from far_models.pictures import open_pictures, shuffled, visiting_order
from far_training.data.latents import LatentSet
from far_training.data.shards import ROWS, ShardedArray, Shards, write_shards
from far_training.loop.cost_estimate import bytes_text, measured_cost
from far_training.loop.optimization import recompute_blocks
from far_training.loop.randomness import SampleRng
from far_training.systems.far import far_task
from far_training.systems.settings import FARLossSettings

IMAGENET = 1_281_167


def timed(work: Callable[[], Any], repeat: int = 1) -> tuple[float, Any]:
    """Seconds of one call, and the result of the last one."""
    started = time.perf_counter()
    for _ in range(repeat):
        result = work()
    return (time.perf_counter() - started) / repeat, result


def row(what: str, seconds: float, more: str = "") -> None:
    """Print a row of the table."""
    click.echo(f"| {what} | {1000 * seconds:.3g} ms | {more} |")


def folder_row(folder: Path, files: int) -> None:
    """Time opening a folder of many pictures in 100 classes."""
    for label in range(100):
        (folder / f"n{label:08d}").mkdir()
        for i in range(files // 100):
            (folder / f"n{label:08d}" / f"n{label:08d}_{i}.JPEG").with_suffix(".jpg").touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, pictures = timed(lambda: open_pictures(folder, 256))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    count = len(pictures.labels)
    more = f"{bytes_text(grown)} of memory; ImageNet at this rate {seconds * IMAGENET / count:.1f} s"
    row(f"open a folder of {count} pictures", seconds, more)


def picture_row(folder: Path) -> None:
    """Time decoding JPEG files of ImageNet's usual size; their content is noise, which is harder than most."""
    rng = np.random.default_rng(0)
    (folder / "n0").mkdir()
    for i in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "n0" / f"{i}.jpg", quality=90)
    pictures = open_pictures(folder, 256)
    seconds = timed(lambda: pictures.read(np.arange(64)), 3)[0]
    row("decode 64 JPEG files of 500 x 375", seconds, f"{64 / seconds:.0f} pictures/s, {os.cpu_count()} cores")


def order_rows() -> None:
    """Time the order of an epoch of ImageNet, and the random numbers of a step."""
    shuffled.cache_clear()
    row("order of a pass through ImageNet, once", timed(lambda: visiting_order(0, 256, IMAGENET, 0))[0])
    row("rows of a step", timed(lambda: visiting_order(1, 256, IMAGENET, 0), 100)[0])
    for count, tokens, draws, what in ((32, 64, 2, "small"), (32, 256, 4, "official")):

        def draw(count: int = count, tokens: int = tokens, draws: int = draws) -> None:
            rng, side = SampleRng(0, 0, range(count)), round(tokens**0.5)
            rng.normal(16, side, side), rng.uniform(tokens), rng.integers(1000, tokens, draws)
            rng.normal(tokens, draws, 16)

        row(f"random numbers of {count} samples, {tokens} tokens x {draws} draws ({what})", timed(draw, 10)[0])


def shard_rows(folder: Path, rows: int) -> None:
    """Time reading random rows of cached latents of 256 px pictures in float16."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((64, 2, 2, 16, 16, 16)).astype(np.float16)
    array = ShardedArray(
        count=rows, rows=ROWS, read=lambda numbers: numbers, encode=lambda numbers: block[: len(numbers)], batch=64
    )
    write_shards(folder, array, lambda line: None)
    size = sum(path.stat().st_size for path in folder.iterdir())
    seconds, shards = timed(lambda: Shards(folder, rows, ROWS))
    more = f"{bytes_text(size)}; ImageNet {bytes_text(size * IMAGENET / rows)} (float32 twice that)"
    row(f"open cached latents of {rows} pictures, float16", seconds, more)
    order = shuffled(rows, 1, 0)
    parts = iter(np.array_split(order[:3200], 100))
    row("read 32 of them at random", timed(lambda: shards[next(parts)], 100)[0])


def step_rows(preset: str, batch: int) -> None:
    """Print FLOP and activations of a step, with and without recomputed blocks."""
    config = PRESETS[{"far-b": "far_base", "far-l": "far_large", "far-h": "far_huge"}[preset]]

    def moments(rows: np.ndarray, flip: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.zeros(len(rows), config.channels, config.grid, config.grid)
        return mean, mean

    names = tuple(map(str, range(1000)))
    data = LatentSet(Path("none"), 16, 16, 0.2325, np.arange(batch), names, np.arange(batch), moments)
    task = far_task(config, FARLossSettings(), data, batch, 0, lambda model, step, folder: {})
    given = task.fetch(SampleRng(0, 0, range(batch)), 0.0)
    for again in (False, True):
        if again:
            recompute_blocks(task.model)
        cost = measured_cost(task.losses, given, autocast=True)
        task.losses.zero_grad(set_to_none=True)
        what = "blocks computed again" if again else "all kept"
        more = f"{cost.flop / 1e12:.2f} TFLOP, activations {bytes_text(cost.activations)}"
        click.echo(f"| a step of {preset}, {batch} pictures, bfloat16, {what} | | {more} |")


@click.command(help=__doc__)
@click.option("--files", type=click.IntRange(100), default=100_000, show_default=True, help="Files of the folder.")
@click.option("--rows", type=click.IntRange(3200), default=20_000, show_default=True, help="Cached latents.")
@click.option(
    "--preset", type=click.Choice(["far-b", "far-l", "far-h"]), default="far-b", show_default=True, help="Model size."
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Pictures of a step.")
def main(files: int, rows: int, preset: str, batch: int) -> None:
    click.echo("| what | time | |\n| --- | ---: | --- |")
    with tempfile.TemporaryDirectory() as folder:
        folder_row(Path(folder), files)
    with tempfile.TemporaryDirectory() as folder:
        picture_row(Path(folder))
    order_rows()
    with tempfile.TemporaryDirectory() as folder:
        shard_rows(Path(folder), rows)
    step_rows(preset, batch)


if __name__ == "__main__":
    main()
