"""Peak memory of `far export` for a preset, against the size of its FP32 weights.

    python scripts/bench_export_memory.py [--preset far_huge] [--keep DIR]

Writes a checkpoint with random weights in the official layout and kl16's sizes, exports it in a process of its own and
reads that process's peak resident memory from the operating system. Needs disk for twice the weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import click
import torch

from far_models.far import FAR, PRESETS
from far_models.kl_vae import AutoencoderKL, VAEConfig


def write_checkpoints(preset: str, folder: Path) -> int:
    """Random checkpoint-last.pth and kl16.ckpt in `folder`; returns the bytes of FAR's FP32 weights."""
    far = FAR(PRESETS[preset])
    for parameter in far.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = far.state_dict()
    arguments = argparse.Namespace(model=preset, mask=False)
    torch.save({"model_ema": weights, "args": arguments}, folder / "checkpoint-last.pth")
    torch.save({"model": AutoencoderKL(VAEConfig()).state_dict()}, folder / "kl16.ckpt")
    return sum(tensor.nbytes for tensor in weights.values())


def export(folder: Path) -> None:
    """Export what `write_checkpoints` wrote, as `far export` does."""
    from far_export.export import export_bundle

    export_bundle(folder / "checkpoint-last.pth", folder / "kl16.ckpt", folder / "bundle", report=click.echo)


def run_apart(function: object, *args: object) -> tuple[float, int]:
    """Run function(*args) in a fresh process; returns its seconds and peak resident bytes."""
    context = multiprocessing.get_context("spawn")
    before = time.monotonic()
    with context.Pool(1) as pool:
        peak = pool.apply(_measured, (function, args))
    return time.monotonic() - before, peak


def _measured(function: object, args: tuple[object, ...]) -> int:
    function(*args)  # type: ignore[operator]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@click.command(help=__doc__)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="far_huge", show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Write the files here and leave them.")
def main(preset: str, keep: Path | None) -> None:
    with tempfile.TemporaryDirectory() as aside:
        folder = keep or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        weights = write_checkpoints(preset, folder)
        seconds, peak = run_apart(export, folder)
        result = {
            "preset": preset,
            "weights_gb": round(weights / 1e9, 3),
            "peak_gb": round(peak / 1e9, 3),
            "ratio": round(peak / weights, 3),
            "seconds": round(seconds, 1),
        }
        click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
