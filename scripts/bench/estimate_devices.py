"""Estimate the time of a picture on devices from FLOP and bytes; nothing is measured.

    python scripts/bench/estimate_devices.py BUNDLE [BUNDLE ...] [--batch 1]

A call takes the longer of two times: its arithmetic at half of the device's FP16 or INT8 rate without sparsity, and
reading its weights once at the device's memory bandwidth. Activations, kernel launches and the host are not counted,
since a whole generation is one CUDA graph. Rates are those of the vendor's data sheets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from far_export.onnx.quantize import STAGES as QUANTISED
from far_runtime.bundle import Manifest, open_bundle
from far_runtime.sampling.base import Call, Step
from far_runtime.sampling.flops import AFTER_LOOP, BEFORE_LOOP, call_flops
from far_runtime.sampling.presets import preset_names
from far_runtime.sampling.settings import plan_of, resolve_settings

SHARE = 0.5
"""Share of the rate that is assumed to be reached; a guess, since no engine was run on these devices."""


@dataclass(frozen=True)
class Device:
    """A device by its data sheet."""

    name: str

    fp16: float
    """Dense FP16 rate in operations per second."""

    int8: float
    """Dense INT8 rate in operations per second."""

    bandwidth: float
    """Memory bandwidth in bytes per second."""


DEVICES = (
    Device("Jetson AGX Orin 64 GB", 42.5e12, 85e12, 204.8e9),
    Device("H100 SXM", 989e12, 1979e12, 3.35e12),
)


def seconds(manifest: Manifest, plan: Sequence[Step], device: Device, precision: str, batch: int) -> float:
    """Estimated seconds of a picture."""
    have = {graph.stage for graph in manifest.graphs}
    calls = [
        *(call for step in plan for call in step.calls),
        *(Call(stage) for stage in (*BEFORE_LOOP, *AFTER_LOOP) if stage in have),
    ]
    total = 0.0
    for call in calls:
        quantised = precision == "int8" and call.stage in QUANTISED
        rate, width = (device.int8, 1) if quantised else (device.fp16, 2)
        parameters = manifest.graph(call.stage, call.constants).parameters
        arithmetic = batch * call_flops(manifest, call) / (SHARE * rate)
        total += max(arithmetic, call.times * parameters * width / device.bandwidth)
    return total / batch


def settings(manifest: Manifest, preset: str) -> Mapping[str, Any]:
    """The settings of a preset with the official levels and iterations."""
    official = resolve_settings(manifest, {"preset": "official"})
    loop: dict[str, Any] = {name: official[name] for name in ("levels", "iterations") if name in official}
    return resolve_settings(manifest, {"preset": preset, **loop})


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size.")
def main(bundles: tuple[Path, ...], batch: int) -> None:
    heads = [f"{device.name}, {precision}" for device in DEVICES for precision in ("FP16", "INT8")]
    click.echo(f"Estimates in ms a picture, batch {batch}\n")
    click.echo("| bundle | preset | " + " | ".join(heads) + " |\n| --- | --- |" + " ---: |" * len(heads))
    for path in bundles:
        manifest = open_bundle(path, check=False).manifest
        for preset in preset_names(manifest):
            plan = plan_of(manifest, settings(manifest, preset))
            milliseconds = [
                1000 * seconds(manifest, plan, device, precision, batch)
                for device in DEVICES
                for precision in ("fp16", "int8")
            ]
            click.echo(
                f"| {path.parent.name} | {preset} | " + " | ".join(f"{value:.3g}" for value in milliseconds) + " |"
            )


if __name__ == "__main__":
    main()
