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
OWNERS = {
    "threads": ("onnxruntime", "openvino"),
    "mode": ("openvino",),
    "pinning": ("openvino",),
    "arena": ("onnxruntime",),
    "low_memory": ("onnxruntime", "openvino"),
    "cuda_graph": ("tensorrt", "tensorrt-rtx"),
    "weight_budget": ("tensorrt", "tensorrt-rtx"),
}
"""The parameters that make up EngineOptions, by its names, and the engines that each concerns; others pass over it."""

NAMES = (
    "onnxruntime (:cuda, :tensorrt, :tensorrt-rtx, :openvino), openvino (:gpu, :npu, :cpu:bf16), tensorrt or "
    "tensorrt-rtx"
)
BEST = "the best that is installed"


def engine_options(default: str, several: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --engine and the options of `EngineOptions`; `default` says what runs without --engine. several: --engine may
    be repeated."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option(
            "--weight-budget",
            type=click.IntRange(0),
            metavar="MIB",
            help="MiB of each engine's weights that stay on the GPU, for TensorRT engines with weight streaming.",
        )(command)
        command = click.option(
            "--cuda-graph/--no-cuda-graph",
            default=True,
            help="Whether TensorRT captures whole generations. Default: it does.",
        )(command)
        command = click.option(
            "--mode",
            type=click.Choice(MODES),
            default=MODES[0],
            show_default=True,
            help="OpenVINO plans for one picture after another, or for many processes or threads that draw at once.",
        )(command)
        command = click.option(
            "--pin/--no-pin",
            "pinning",
            default=None,
            help="OpenVINO keeps every thread on a core, which is bad on a busy machine. Default: its choice.",
        )(command)
        command = click.option(
            "--arena/--no-arena",
            default=True,
            show_default=True,
            help="ONNX Runtime keeps the CPU's memory for the next call; without, it gives it back: slower, smaller.",
        )(command)
        command = click.option(
            "--low-memory",
            is_flag=True,
            help="OpenVINO and ONNX Runtime load a stage only while it is used, one at a time: slower, smaller.",
        )(command)
        command = click.option(
            "--threads",
            type=click.IntRange(1, MAX_THREADS),
            help="Threads of the engine. Default: the engine's choice.",
        )(command)
        names = f"{NAMES}, torch, torch:compile; may be repeated" if several else NAMES
        return click.option("--engine", multiple=several, metavar="NAME", help=f"{names}. Default: {default}.")(command)

    return add


def take_engine(options: dict[str, Any]) -> tuple[str | None, EngineOptions]:
    """Remove the engine's options from a command's; returns its name, if given, and how it is to run."""
    from far_runtime.engines.base import EngineOptions

    name: str | None = options.pop("engine")
    return name, EngineOptions(**{option: options.pop(option) for option in OWNERS})


def resolve_engine(name: str | None, bundle: Bundle) -> tuple[str, list[str]]:
    """The engine that a command uses, and the lines to print of it: why it is the best one, where none was named.

    Warns of options on the command line that are of other engines.
    """
    from far_runtime.engines.select import best_unless

    choice = best_unless(name, bundle)
    warn_of_unused(choice.name)
    return choice.name, [choice_line(choice)] if choice.reason else []


def choice_line(choice: Choice) -> str:
    """Why an engine was chosen, as commands print it."""
    return f"engine {choice.name}: {choice.reason}; --engine chooses another"


def warn_of_unused(engine: str) -> None:
    """Say which of the options on the command line are of other engines than this one."""
    context = click.get_current_context(silent=True)
    library = engine.partition(":")[0]
    if all(library not in owners for owners in OWNERS.values()):
        return  # an unknown engine is refused, which says more
    for option in context.command.params if context is not None else ():
        owners, name = OWNERS.get(option.name or "", ()), "/".join([*option.opts, *option.secondary_opts])
        if owners and library not in owners and is_given(context, option):
            click.echo(f"warning: {name}: of {' and '.join(owners)}, nothing to {engine}", err=True)


def is_given(context: click.Context | None, option: click.Parameter) -> bool:
    """Whether an option stands on the command line."""
    source = context and context.get_parameter_source(option.name or "")
    return source == click.core.ParameterSource.COMMANDLINE


def take_engines(options: dict[str, Any]) -> tuple[tuple[str, ...], EngineOptions]:
    """The same of a command that takes several engines."""
    names, settings = take_engine(options)
    return tuple(names or ()), settings
