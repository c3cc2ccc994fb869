"""Time and sizes of `far build --engine tensorrt-rtx` for models of the published sizes, without a GPU.

    python scripts/bench/tensorrt_build.py [--preset far_base] [--precision fp16] [--target sm89] [--json FILE]

Writes a checkpoint with random weights in the official layout, exports it and builds every stage. Prints a Markdown
table: seconds, size of the engine file, activation and weight memory on the GPU as TensorRT reports it, and peak
resident memory of the builder's process. With --keep DIR, checkpoints and bundles in DIR are used again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from export_memory import CONTINUOUS, VAR, export, run_apart, write_checkpoints


def measure(bundle: Path, targets: tuple[str, ...], batch: tuple[int, int, int] | None) -> dict[str, Any]:
    """Build a bundle's engines and remove them; what the builder noted of every stage."""
    from far_runtime.bundle import open_bundle
    from far_runtime.engines.cache.store import EngineCache
    from far_runtime.engines.tensorrt.builder.build import build_engines
    from far_runtime.engines.tensorrt.builder.options import BuildOptions

    opened = open_bundle(bundle)
    engine = build_engines(opened, "tensorrt-rtx", BuildOptions(targets=targets, batch=batch), click.echo)
    result = {
        "precision": opened.manifest.precision,
        "version": engine.facts["version"],
        "targets": list(targets),
        "seconds": round(engine.seconds, 1),
        "stages": dict(engine.notes),
    }
    EngineCache(opened).remove(engine)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table with a row per stage."""
    lines = [
        "| model | precision | stage | build s | engine file MB | activation MB | weights MB | builder's peak MB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        for stage, notes in result["stages"].items():
            sizes = (notes.get(name) for name in ("plan", "activation", "weights", "peak"))
            cells = " | ".join("" if size is None else f"{size / 1e6:,.1f}" for size in sizes)
            lines.append(f"| {result['preset']} | {result['precision']} | {stage} | {notes['seconds']:.1f} | {cells} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option(
    "--preset",
    "presets",
    type=click.Choice([*CONTINUOUS, *VAR]),
    multiple=True,
    default=["far_base"],
    show_default=True,
    help="Model size; may be repeated.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="fp16",
    show_default=True,
    help="Precision of the bundle.",
)
@click.option("--target", default="sm89", show_default=True, help="Compute capabilities, with commas between them.")
@click.option("--batch", type=(int, int, int), help="Smallest, usual and largest batch size. Default: the bundle's.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write the results to this file too.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for checkpoints and bundles, kept afterwards.")
def main(
    presets: tuple[str, ...],
    precision: str,
    target: str,
    batch: tuple[int, int, int] | None,
    report: Path | None,
    keep: Path | None,
) -> None:
    results = []
    for preset in presets:
        with tempfile.TemporaryDirectory() as aside:
            folder = (keep or Path(aside)) / preset
            folder.mkdir(parents=True, exist_ok=True)
            bundle = folder / f"bundle-{precision}"
            if not bundle.exists():
                if not (folder / "vae.pth").exists():
                    write_checkpoints(preset, folder)
                run_apart(export, folder, preset, precision, bundle)
            results.append({"preset": preset, **measure(bundle, tuple(target.split(",")), batch)})
    click.echo(table(results))
    if report is not None:
        report.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
