"""Options that every command with an engine shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from far_runtime.images.metadata import MAX_THREADS

if TYPE_CHECKING:
    from far_runtime.bundle import Bundle
    from far_runtime.engines.base import EngineOptions
    from far_runtime.engines.select import Choice

MODES = ("latency", "throughput")
LIBRARIES_OF = {
    "threads": ("onnxruntime", "openvino"),
    "mode": ("openvino",),
    "pinning": ("openvino",),
    "arena": ("onnxruntime",),
    "low_memory": ("onnxruntime", "openvino"),
    "cuda_graph": ("tensorrt", "tensorrt-rtx"),
    "weight_budget": ("tensorrt", "tensorrt-rtx"),
}
"""The fields of EngineOptions, and the engine libraries that read each."""

NAMES = (
    "onnxruntime (:cuda, :tensorrt, :tensorrt-rtx, :openvino), openvino (:gpu, :npu, :cpu:bf16), tensorrt or "
    "tensorrt-rtx"
)
BEST = "the best that is installed"


def engine_options(default: str, several: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --engine and an option for every field of `EngineOptions` to a command.

    The text `default` tells what runs without --engine. With `several`, --engine may be repeated.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option(
            "--weight-budget",
            type=click.IntRange(0),
            metavar="MIB",
            help="Weights of each stage that stay on the GPU, in MiB; for TensorRT engines with weight streaming.",
        )(command)
        command = click.option(
            "--cuda-graph/--no-cuda-graph",
            default=True,
            show_default=True,
            help="Let TensorRT capture a whole generation as a CUDA graph and replay it.",
        )(command)
        command = click.option(
            "--mode",
            type=click.Choice(MODES),
            default=MODES[0],
            show_default=True,
            help="What OpenVINO is set up for: one picture after another, or many threads that draw at once.",
        )(command)
        command = click.option(
            "--pin/--no-pin",
            "pinning",
            default=None,
            help="Let OpenVINO bind every thread to a core, slow on a busy machine. Default: OpenVINO's choice.",
        )(command)
        command = click.option(
            "--arena/--no-arena",
            default=True,
            show_default=True,
            help="Let ONNX Runtime keep host memory for the next call. --no-arena frees it: slower, with less memory.",
        )(command)
        command = click.option(
            "--low-memory",
            is_flag=True,
            help="Let OpenVINO and ONNX Runtime load one stage at a time, while it is used: slower, with less memory.",
        )(command)
        command = click.option(
            "--threads",
            type=click.IntRange(1, MAX_THREADS),
            help="CPU threads of the engine. Default: the engine's choice.",
        )(command)
        names = f"{NAMES}, torch, torch:compile; may be repeated" if several else NAMES
        return click.option("--engine", multiple=several, metavar="NAME", help=f"{names}. Default: {default}.")(command)

    return add


def take_engine(options: dict[str, Any]) -> tuple[str | None, EngineOptions]:
    """Remove the options of `engine_options` from a command's; returns the value of --engine and the other options."""
    from far_runtime.engines.base import EngineOptions

    name: str | None = options.pop("engine")
    return name, EngineOptions(**{option: options.pop(option) for option in LIBRARIES_OF})


def resolve_engine(name: str | None, bundle: Bundle) -> tuple[Choice, list[str]]:
    """The engine that a command uses, and a line that says why, if the user named none.

    Prints warnings for options on the command line that this engine does not read.
    """
    from far_runtime.engines.select import best_unless

    choice = best_unless(name, bundle)
    warn_of_unused(choice.name)
    return choice, [choice_line(choice)] if choice.reason else []


def choice_line(choice: Choice) -> str:
    """The line that commands print about the choice of an engine."""
    return f"engine {choice.name}: {choice.reason}; --engine chooses another"


def warn_of_unused(engine: str) -> None:
    """Print warnings for options on the command line that this engine does not read."""
    context = click.get_current_context(silent=True)
    library = engine.partition(":")[0]
    if all(library not in libraries for libraries in LIBRARIES_OF.values()):
        # Opening an unknown engine fails with a message that says more.
        return
    for option in context.command.params if context is not None else ():
        libraries, name = LIBRARIES_OF.get(option.name or "", ()), "/".join([*option.opts, *option.secondary_opts])
        if libraries and library not in libraries and is_given(context, option):
            click.echo(f"warning: {name}: of {' and '.join(libraries)}, nothing to {engine}", err=True)


def is_given(context: click.Context | None, option: click.Parameter) -> bool:
    """Whether an option was given on the command line."""
    source = context and context.get_parameter_source(option.name or "")
    return source == click.core.ParameterSource.COMMANDLINE


def take_engines(options: dict[str, Any]) -> tuple[tuple[str, ...], EngineOptions]:
    """The same for a command whose --engine may be repeated."""
    names, engine_options = take_engine(options)
    return tuple(names or ()), engine_options
