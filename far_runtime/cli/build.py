"""`far build`: compile a bundle's stages before they are first used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from far_runtime.cli.engine_options import engine_options, take_engine, warn_of_unused
from far_runtime.engines.tensorrt.builder.options import LIBRARIES, MAX_LEVEL, PORTABLE


@click.command(short_help="Compile a bundle's stages for an engine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@engine_options("none; it is required")
@click.option(
    "--target",
    metavar="sm86,sm89",
    help="Compute capabilities to build for, on a machine with or without a GPU; tensorrt-rtx only.",
)
@click.option(
    "--batch",
    metavar="MIN:USUAL:MAX",
    help="Smallest, usual and largest batch size, such as 1:4:8. Default: the bundle's.",
)
@click.option(
    "--profiles",
    type=click.IntRange(1),
    help="Largest number of optimisation profiles of a graph, one per step of the loop. Default: 12; tensorrt-rtx 1.",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, MAX_LEVEL),
    help="How long the builder searches for fast kernels. Default: TensorRT's.",
)
@click.option(
    "--workspace", type=click.IntRange(1), metavar="MIB", help="GPU memory that a layer may use, in MiB. Default: all."
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of the timing cache. Default: one in your cache folder.",
)
@click.option(
    "--version-compatible", is_flag=True, help="Build engines that also run on later minor versions of TensorRT."
)
@click.option(
    "--hardware-compatible",
    type=click.Choice(PORTABLE),
    help="Build engines that also run on other GPUs: Ampere and later, or those of the same compute capability.",
)
@click.option("--refittable", is_flag=True, help="Build engines whose weights can be replaced.")
@click.option(
    "--weight-stripped",
    "stripped",
    is_flag=True,
    help="Build engines without weights, which are read from the bundle at load: smaller files.",
)
@click.option(
    "--weight-streaming",
    is_flag=True,
    help="Build engines that can keep a part of their weights on the host (see --weight-budget).",
)
def build(bundle: Path, target: str | None, batch: str | None, **options: Any) -> None:
    """Compile the stages of BUNDLE for an engine and keep the result for later runs.

    It is kept in the bundle's folder `engines`, or in your cache folder if the bundle is read-only. Prints a line per
    stage; engines that are there already are not built again. tensorrt builds for the GPU of this machine, tensorrt-rtx
    for --target.
    """
    from far_runtime.bundle import open_bundle

    name, runtime = take_engine(options)
    if name is None:
        raise click.UsageError("--engine is missing: tensorrt, tensorrt-rtx, onnxruntime or openvino")
    opened = open_bundle(bundle)
    warn_of_unused(name)
    if name in LIBRARIES:
        from far_runtime.engines.tensorrt.builder.build import build_engines
        from far_runtime.engines.tensorrt.builder.options import BuildOptions

        targets = tuple(part.strip() for part in target.split(",")) if target is not None else ()
        settings = BuildOptions(targets=targets, batch=None if batch is None else _sizes(batch), **options)
        engine = build_engines(opened, name, settings, click.echo)
        click.echo(f"{engine.path}: {engine.size / 1e6:.1f} MB, built in {engine.seconds:.1f} s")
        return
    given = [key for key, value in {"target": target, "batch": batch, **options}.items() if value]
    if given:
        raise click.UsageError(f"--{given[0].replace('_', '-')}: only tensorrt and tensorrt-rtx have it")
    from far_runtime.engines.compile_ahead import compile_ahead

    compile_ahead(opened, name, runtime, click.echo)


def _sizes(text: str) -> tuple[int, int, int]:
    """The smallest, usual and largest batch size from "1:4:8"."""
    try:
        low, usual, high = (int(part) for part in text.split(":"))
    except ValueError:
        message = f"{text}: expected smallest, usual and largest, such as 1:4:8"
        raise click.BadParameter(message, param_hint="--batch") from None
    return low, usual, high
