"""Options that every command with an engine shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from far_runtime.settings import MAX_THREADS

if TYPE_CHECKING:
    from far_runtime.engines.base import EngineOptions

OPTIONS = ("threads", "cuda_graph", "weight_budget")
"""The parameters that make up EngineOptions, by its names."""

NAMES = "onnxruntime (:cuda, :tensorrt), openvino (:gpu, :npu), tensorrt or tensorrt-rtx"


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
    return name, EngineOptions(**{option: options.pop(option) for option in OPTIONS})


def take_engines(options: dict[str, Any]) -> tuple[tuple[str, ...], EngineOptions]:
    """The same of a command that takes several engines."""
    names, settings = take_engine(options)
    return tuple(names or ()), settings
