"""Engines by name, those that other packages add by entry point included."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from far_runtime.bundle import Bundle
from far_runtime.engines import ENGINES, open_engine
from far_runtime.engines.base import Engine, EngineOptions
from far_runtime.errors import FarError, SettingName

GROUP = "far.engines"
"""Entry points `library = module`: modules that are a `Plugin`."""

CPU, GPU = "cpu", "gpu"
DEVICES = {"cuda": GPU, "tensorrt": GPU, "tensorrt-rtx": GPU, "gpu": GPU, "npu": "npu"}


@dataclass(frozen=True)
class Sources:
    """Files that an engine needs which runs the checkpoint itself; None where they were not given."""

    checkpoint: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None


class Plugin(Protocol):
    """A module that adds an engine. It is imported when its engine is asked for, in the engine's own process."""

    def open_plugin(self, bundle: Bundle, variant: str, options: EngineOptions, sources: Sources) -> Engine:
        """The engine; variant: what follows the colon of its name. Raises FarError for what it lacks."""


@dataclass(frozen=True)
class Contender:
    """An engine that was asked for. name: as it was given. plugin: the module that adds it."""

    name: str
    plugin: str | None = None

    def open(self, bundle: Bundle, options: EngineOptions, sources: Sources) -> Engine:
        """The engine over a bundle; FarError for an unknown name and for a library or a file that is missing."""
        if self.plugin is None:
            return open_engine(bundle, self.name, options)
        library, _, variant = self.name.partition(":")
        try:
            plugin: Plugin | Any = importlib.import_module(self.plugin)
        except ModuleNotFoundError as error:
            raise FarError(
                f"engine {self.name}: needs {(error.name or library).partition('.')[0]} ({error}); install it with: "
                "pip install 'far-deploy[export]'"
            ) from error
        engine: Engine = plugin.open_plugin(bundle, variant, options, sources)
        return engine


def plugins() -> dict[str, str]:
    """Module of every engine that the installed packages add, by its library's name."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=GROUP)}


def contenders(names: Sequence[str]) -> list[Contender]:
    """The engines asked for; FarError, before anything is opened, for unknown and repeated names."""
    added = plugins()
    for i, name in enumerate(names):
        library = name.partition(":")[0]
        if library not in ENGINES and library not in added:
            raise FarError(f"engine {name!r}: unknown; known: {', '.join([*ENGINES, *added])}")
        if name in names[:i]:
            raise FarError(SettingName("engine"), f" {name}: given twice; name each engine once")
    return [Contender(name, added.get(name.partition(":")[0])) for name in names]


def device_of(engine: str) -> str:
    """Where an engine computes, by its name: "cpu", "gpu" or "npu"."""
    library, *rest = engine.split(":")
    return next((DEVICES[part] for part in (*rest, library) if part in DEVICES), CPU)


def computed_in(engine: str, precision: str, plugin: bool = False) -> tuple[str, str]:
    """The precision of the matrix products of an engine over a bundle of `precision`, and what is to be said of it.

    The CPU engines have no FP16 arithmetic: FP16 graphs are computed in FP32. BF16 they compute in where OpenVINO is
    told to, INT8 where the graph says so.
    """
    hints = {"bf16": "bf16"} if device_of(engine) == CPU else {"bf16": "bf16", "f16": "fp16"}
    hint = next((hints[part] for part in engine.split(":")[1:] if part in hints), None)
    if plugin:
        return "fp32", "" if precision == "fp32" else "runs the checkpoint in fp32"
    if precision == "int8":
        return "int8", ""
    if hint is not None or device_of(engine) != CPU:
        return hint or precision, ""
    return "fp32", "" if precision == "fp32" else f"{precision} graphs are computed in fp32 on the CPU"
