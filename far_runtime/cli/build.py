"""`far build`: a bundle's stages compiled ahead of their first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from far_runtime.cli.engine_options import engine_options, take_engine, warn_of_unused
from far_runtime.engines.tensorrt.builder.options import LIBRARIES, MAX_LEVEL, PORTABLE


@click.command(short_help="Compile a bundle's stages for an engine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@engine_options("none, it has to be given")
@click.option("--target", metavar="sm86,sm89", help="Compute capabilities to build for (tensorrt-rtx), GPU or not.")
@click.option("--batch", metavar="MIN:USUAL:MAX", help="Pictures at once, as 1:4:8. Default: as exported.")
@click.option(
    "--profiles",
    type=click.IntRange(1),
    help="The most optimisation profiles of a graph, one per step of the schedule. Default: 12, tensorrt-rtx: 1.",
)
@click.option("--optimization-level", type=click.IntRange(0, MAX_LEVEL), help="How long the builder searches.")
@click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="Memory that a layer may use.")
@click.option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False), help="Default: in your cache folder.")
@click.option("--version-compatible", is_flag=True, help="Also runs on later minor versions of TensorRT.")
@click.option(
    "--hardware-compatible",
    type=click.Choice(PORTABLE),
    help="Also runs on other GPUs: Ampere and later, or those of one compute capability.",
)
@click.option("--refittable", is_flag=True, help="New weights can be put into the engine.")
@click.option("--weight-stripped", "stripped", is_flag=True, help="Small files: weights come from the bundle at load.")
@click.option("--weight-streaming", is_flag=True, help="A part of the weights may stay on the host (--weight-budget).")
def build(bundle: Path, target: str | None, batch: str | None, **options: Any) -> None:
    """Compile the stages of BUNDLE for an engine and keep them in its folder `engines`, or in your cache folder where
    the bundle cannot be written. Prints a line per stage; what was built already is not built again.

    tensorrt builds for the GPU of this machine. tensorrt-rtx builds for --target, with or without a GPU.
    """
    from far_runtime.bundle import open_bundle

    name, run = take_engine(options)
    if name is None:
        raise click.UsageError("--engine is missing: tensorrt, tensorrt-rtx, onnxruntime or openvino")
    opened = open_bundle(bundle)
    warn_of_unused(name)
    if name in LIBRARIES:
        from far_runtime.engines.tensorrt.builder.options import BuildOptions
        from far_runtime.engines.tensorrt.builder.tensorrt import build_engines

        targets = tuple(part.strip() for part in target.split(",")) if target is not None else ()
        settings = BuildOptions(targets=targets, batch=None if batch is None else _sizes(batch), **options)
        engine = build_engines(opened, name, settings, click.echo)
        click.echo(f"{engine.path}: {engine.size / 1e6:.1f} MB, built in {engine.seconds:.1f} s")
        return
    given = [key for key, value in {"target": target, "batch": batch, **options}.items() if value]
    if given:
        raise click.UsageError(f"--{given[0].replace('_', '-')}: only tensorrt and tensorrt-rtx have it")
    from far_runtime.engines.tensorrt.builder.ahead import compile_ahead

    compile_ahead(opened, name, run, click.echo)


def _sizes(text: str) -> tuple[int, int, int]:
    try:
        low, usual, high = (int(part) for part in text.split(":"))
    except ValueError:
        said = f"{text}: expected smallest, usual and largest, as 1:4:8"
        raise click.BadParameter(said, param_hint="--batch") from None
    return low, usual, high
