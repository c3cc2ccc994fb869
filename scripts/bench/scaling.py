"""Seconds of a picture against levels, diffusion steps, batch size and resolution, each varied alone.

    python scripts/bench/scaling.py BUNDLE [--engine NAME] [--rounds 5] [--plot FILE.png] [--json FILE]

Resolution is that of small random models of the bundle's kind, with 4, 8, 16 and 32 latents a side. All of a kind are
drawn in turn, medians; beside each stands what a straight line through the first and the last point gives.
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
from settings import in_turn

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
    """Seconds by what is varied and its size: a picture, or (batch) all of a batch."""
    found = {}
    with Pipeline.from_bundle(bundle, engine) as pipeline:
        few = {"solver": "dpmpp-2m", "steps": 4}
        levels = list(pipeline.bundle.manifest.default_settings["levels"])

        def draw(count: int = 1, **sampling: Any) -> Callable[[], Any]:
            chosen = {**few, **sampling}
            return lambda: pipeline.generate([1] * count, range(count), batch_size=count, **chosen)

        found["levels"] = in_turn({n: draw(levels=levels[:n]) for n in range(1, len(levels) + 1)}, rounds)
        found["diffusion steps"] = in_turn({n: draw(steps=n) for n in STEPS}, rounds)
        found["pictures at once"] = in_turn({n: draw(n) for n in BATCHES}, rounds)
    with tempfile.TemporaryDirectory() as aside:
        opened = {grid: Pipeline.from_bundle(write_model(grid, Path(aside)), engine) for grid in GRIDS}
        ways = {
            grid * grid: lambda one=one: one.generate([1], [0], levels=[0, 1, 2, 3], **few)
            for grid, one in opened.items()
        }
        found["tokens"] = in_turn(ways, rounds)
    return found


def line_through(found: Mapping[int, float]) -> dict[int, float]:
    """The straight line through the first and the last point."""
    (first, low), *_, (last, high) = found.items()
    return {size: low + (high - low) * (size - first) / (last - first) for size in found}


def save_plot(result: Mapping[str, Mapping[int, float]], title: str, path: Path) -> None:
    figure = new_figure(12, 3.2, dpi=120)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    for axes, (name, found) in zip(figure.subplots(1, len(result)), result.items(), strict=True):
        axes.plot(list(found), list(found.values()), marker="o", color="#2463c9", markersize=4)
        straight = line_through(found)
        axes.plot(list(straight), list(straight.values()), color="#8a8f98", linewidth=0.8, linestyle="--")
        axes.set(xlabel=name, ylabel="seconds", ylim=(0, None))
    save_figure(figure, path)


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--engine", default="openvino", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path))
@click.option("--json", "file", type=click.Path(path_type=Path))
def main(bundle: Path, engine: str, rounds: int, plot: Path | None, file: Path | None) -> None:
    result = measure(bundle, engine, rounds)
    for name, found in result.items():
        straight = line_through(found)
        click.echo(f"\n| {name} | seconds | straight line |\n| ---: | ---: | ---: |")
        for size, seconds in found.items():
            click.echo(f"| {size} | {seconds:.3f} | {straight[size]:.3f} |")
    if plot is not None:
        save_plot(result, f"{bundle.name} on {engine}", plot)
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
