"""Peak memory of `far export` for a preset, against the size of its FP32 weights.

    python scripts/bench/export_memory.py [--preset far_huge] [--precision int8] [--keep DIR]

Writes a checkpoint with random weights in the official layout, and its autoencoder at the official size, exports both
in a process of its own and reads that process's peak resident memory from the operating system. Needs disk for twice
the weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from far_models.far import FAR, PRESETS
from far_models.kl_vae import AutoencoderKL, VAEConfig
from far_models.mar import MAR
from far_models.mar import PRESETS as MAR_PRESETS
from far_runtime.bundle import PRECISIONS

CONTINUOUS = {**PRESETS, **MAR_PRESETS}
VAR = [f"var_d{depth}" for depth in (16, 20, 24, 30, 36)]


def networks(preset: str) -> tuple[nn.Module, nn.Module]:
    """The generator of a preset and the autoencoder that belongs to it, uninitialised."""
    if preset.startswith("var_d"):
        from far_models.var import VAR
        from far_models.var import preset as var_preset
        from far_models.vq_vae import VQVAE, VQVAEConfig

        return VAR(var_preset(int(preset.removeprefix("var_d")))), VQVAE(VQVAEConfig())
    return (MAR if preset in MAR_PRESETS else FAR)(CONTINUOUS[preset]), AutoencoderKL(VAEConfig())


def write_checkpoints(preset: str, folder: Path) -> int:
    """Write random checkpoints in the official layout into `folder`; returns the bytes of the generator in FP32."""
    model, vae = networks(preset)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = model.state_dict()
    arguments = argparse.Namespace(model=preset, mask=False)
    flat = preset.startswith("var_d")
    torch.save(weights if flat else {"model_ema": weights, "args": arguments}, folder / "checkpoint-last.pth")
    torch.save(vae.state_dict() if flat else {"model": vae.state_dict()}, folder / "vae.pth")
    return sum(tensor.nbytes for tensor in weights.values())


def quick_settings(preset: str) -> dict[str, Any]:
    """Settings of an export with few steps, since the picture that verifies it is slow at these sizes.

    The head predicts v: with a random head, two steps of epsilon prediction take latents beyond FP16's range, and the
    export is refused.
    """
    if preset in VAR:
        return {}
    few = {"iterations": 2} if preset in MAR_PRESETS else {"levels": [0, 2]}
    return {"defaults": {**few, "steps": "2"}, "overrides": {"prediction": "v"}}


def export(folder: Path, preset: str, precision: str, target: Path) -> None:
    """Export what `write_checkpoints` wrote into `target`, as `far export` does.

    INT8 is calibrated on one picture, since memory does not grow with their number.
    """
    from far_export.export import export_bundle

    calibrate = 1 if precision == "int8" else None
    export_bundle(
        folder / "checkpoint-last.pth", folder / "vae.pth", target, precision=precision, calibrate=calibrate,
        report=click.echo, **quick_settings(preset),
    )  # fmt: skip


def run_apart(function: object, *args: object) -> tuple[float, int]:
    """Run function(*args) in a new process; returns its seconds and its peak resident memory in bytes."""
    context = multiprocessing.get_context("spawn")
    started = time.monotonic()
    with context.Pool(1) as pool:
        peak = pool.apply(_measured, (function, args))
    return time.monotonic() - started, peak


def _measured(function: object, args: tuple[object, ...]) -> int:
    function(*args)  # type: ignore[operator]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@click.command(help=__doc__)
@click.option(
    "--preset", type=click.Choice([*CONTINUOUS, *VAR]), default="far_huge", show_default=True, help="Model size."
)
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Precision of the bundle."
)
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for checkpoints and bundle, kept afterwards.")
def main(preset: str, precision: str, keep: Path | None) -> None:
    with tempfile.TemporaryDirectory() as aside:
        folder = keep or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        weights = write_checkpoints(preset, folder)
        seconds, peak = run_apart(export, folder, preset, precision, folder / "bundle")
        result = {
            "preset": preset,
            "precision": precision,
            "weights_gb": round(weights / 1e9, 3),
            "peak_gb": round(peak / 1e9, 3),
            "ratio": round(peak / weights, 3),
            "seconds": round(seconds, 1),
        }
        click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
