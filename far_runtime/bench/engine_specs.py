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
"""Group of the entry points `library = module` that add engines; the modules are `EnginePlugin`s."""

CPU, GPU = "cpu", "gpu"
DEVICES = {"cuda": GPU, "tensorrt": GPU, "tensorrt-rtx": GPU, "gpu": GPU, "npu": "npu"}
"""Device by the part of an engine's name that says it; the CPU where no part does."""


@dataclass(frozen=True)
class CheckpointFiles:
    """Files for an engine that runs the checkpoint itself; None where the user named none."""

    checkpoint: Path | None = None
    """Weights of the generator."""

    vae: Path | None = None
    """Weights of its VAE."""

    text_encoder: Path | None = None
    """Folder of its text encoder."""


class EnginePlugin(Protocol):
    """A module that adds an engine; it is imported in the engine's own process."""

    def open_plugin(self, bundle: Bundle, variant: str, options: EngineOptions, sources: CheckpointFiles) -> Engine:
        """Open the engine whose name has `variant` behind its colon; FarError for what it lacks."""


@dataclass(frozen=True)
class EngineSpec:
    """An engine to measure."""

    name: str
    """Name as the user gave it, such as "openvino:cpu:bf16"."""

    plugin: str | None = None
    """Module that adds the engine; None for the engines of far_runtime."""

    def open(self, bundle: Bundle, options: EngineOptions, files: CheckpointFiles) -> Engine:
        """Open the engine over a bundle; FarError for an unknown name and for a missing library or file."""
        if self.plugin is None:
            return open_engine(bundle, self.name, options)
        library, _, variant = self.name.partition(":")
        try:
            plugin: EnginePlugin | Any = importlib.import_module(self.plugin)
        except ModuleNotFoundError as error:
            raise FarError(
                f"engine {self.name}: needs {(error.name or library).partition('.')[0]} ({error}); install it with: "
                "pip install 'far-deploy[export]'"
            ) from error
        engine: Engine = plugin.open_plugin(bundle, variant, options, files)
        return engine


def engine_plugins() -> dict[str, str]:
    """Modules of the engines that installed packages add, by library name."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=GROUP)}


def engine_specs(names: Sequence[str]) -> list[EngineSpec]:
    """The engines of these names; FarError for an unknown or repeated one, before any is opened."""
    plugins = engine_plugins()
    for i, name in enumerate(names):
        library = name.partition(":")[0]
        if library not in ENGINES and library not in plugins:
            raise FarError(f"engine {name!r}: unknown; known: {', '.join([*ENGINES, *plugins])}")
        if name in names[:i]:
            raise FarError(SettingName("engine"), f" {name}: given twice; name each engine once")
    return [EngineSpec(name, plugins.get(name.partition(":")[0])) for name in names]


def device_of(engine: str) -> str:
    """Device that an engine computes on, by its name: "cpu", "gpu" or "npu"."""
    library, *rest = engine.split(":")
    return next((DEVICES[part] for part in (*rest, library) if part in DEVICES), CPU)


def compute_precision(engine: str, precision: str, plugin: bool = False) -> tuple[str, str]:
    """Precision of an engine's matrix products over a bundle of `precision`, and a note where the two differ.

    The CPU engines have no FP16 arithmetic and compute FP16 graphs in FP32. They compute in BF16 where OpenVINO has
    that hint, and in INT8 where the graph is quantised.
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
