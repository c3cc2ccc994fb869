"""Seconds of a picture against levels, diffusion steps, batch size and resolution, each varied alone.

    python scripts/bench/scaling.py BUNDLE [--engine NAME] [--rounds 5] [--plot FILE.png] [--json FILE]

Resolution is that of small random FAR models with 4, 8, 16 and 32 latents a side. Times are medians over interleaved
rounds; beside each stands the straight line through the first and the last point.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from far_runtime.pipeline import Pipeline
from far_runtime.plotting import new_figure, save_figure
from timing import median_seconds

STEPS = (1, 2, 4, 8, 16)
BATCHES = (1, 2, 4, 8, 16)
GRIDS = (4, 8, 16, 32)


def write_model(grid: int, folder: Path) -> Path:
    """A bundle of a small random FAR over grid x grid latents."""
    import torch

    from far_export.export import export_bundle
    from far_models.far import FAR, FARConfig
    from far_models.kl_vae import AutoencoderKL, VAEConfig

    torch.manual_seed(0)
    far = FAR(
        FARConfig(
            grid=grid, channels=16, classes=8, buffer=8, encoder_width=192, encoder_depth=4, encoder_heads=4,
            decoder_width=192, decoder_depth=4, decoder_heads=4, head_width=256, head_depth=3, prediction="v",
        )
    )  # fmt: skip
    for parameter in far.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    vae = AutoencoderKL(VAEConfig(ch=32, multipliers=(1, 1, 2, 2), blocks=1, channels=16))
    args = argparse.Namespace(mask=False, encoder_heads=4, decoder_heads=4, prediction="v")
    torch.save({"model_ema": far.state_dict(), "args": args}, folder / f"{grid}.pth")
    torch.save({"model": vae.state_dict()}, folder / f"{grid}-vae.pth")
    export_bundle(folder / f"{grid}.pth", folder / f"{grid}-vae.pth", folder / f"bundle-{grid}", editing=False)
    return folder / f"bundle-{grid}"


def measure(bundle: Path, engine: str, rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of a batch, by what is varied and by its value."""
    seconds = {}
    with Pipeline.from_bundle(bundle, engine) as pipeline:
        few = {"solver": "dpmpp-2m", "steps": 4}
        levels = list(pipeline.bundle.manifest.default_settings["levels"])

        def draw(count: int = 1, **sampling: Any) -> Callable[[], Any]:
            chosen = {**few, **sampling}
            return lambda: pipeline.generate([1] * count, range(count), batch_size=count, **chosen)

        seconds["levels"] = median_seconds({n: draw(levels=levels[:n]) for n in range(1, len(levels) + 1)}, rounds)
        seconds["diffusion steps"] = median_seconds({n: draw(steps=n) for n in STEPS}, rounds)
        seconds["pictures at once"] = median_seconds({n: draw(n) for n in BATCHES}, rounds)
    with tempfile.TemporaryDirectory() as aside:
        opened = {grid: Pipeline.from_bundle(write_model(grid, Path(aside)), engine) for grid in GRIDS}
        functions = {
            grid * grid: lambda pipeline=pipeline: pipeline.generate([1], [0], levels=[0, 1, 2, 3], **few)
            for grid, pipeline in opened.items()
        }
        seconds["tokens"] = median_seconds(functions, rounds)
    return seconds


def line_through(seconds: Mapping[int, float]) -> dict[int, float]:
    """The straight line through the first and the last point."""
    (first, low), *_, (last, high) = seconds.items()
    return {size: low + (high - low) * (size - first) / (last - first) for size in seconds}


def save_plot(result: Mapping[str, Mapping[int, float]], title: str, path: Path) -> None:
    """A curve for each thing that is varied, with its straight line."""
    figure = new_figure(12, 3.2, dpi=120)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    for axes, (name, seconds) in zip(figure.subplots(1, len(result)), result.items(), strict=True):
        axes.plot(list(seconds), list(seconds.values()), marker="o", color="#2463c9", markersize=4)
        straight = line_through(seconds)
        axes.plot(list(straight), list(straight.values()), color="#8a8f98", linewidth=0.8, linestyle="--")
        axes.set(xlabel=name, ylabel="seconds", ylim=(0, None))
    save_figure(figure, path)


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--engine", default="openvino", show_default=True, help="Engine that draws.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds; the times are medians."
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write the curves as a PNG or SVG.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all times, in seconds.")
def main(bundle: Path, engine: str, rounds: int, plot: Path | None, file: Path | None) -> None:
    result = measure(bundle, engine, rounds)
    for name, times in result.items():
        straight = line_through(times)
        click.echo(f"\n| {name} | seconds | straight line |\n| ---: | ---: | ---: |")
        for size, seconds in times.items():
            click.echo(f"| {size} | {seconds:.3f} | {straight[size]:.3f} |")
    if plot is not None:
        save_plot(result, f"{bundle.name} on {engine}", plot)
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
