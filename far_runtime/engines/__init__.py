"""Engines by name: `onnxruntime`, `onnxruntime:cuda`, `onnxruntime:tensorrt`."""

from __future__ import annotations

from far_runtime.bundle import Bundle
from far_runtime.engines.base import Engine
from far_runtime.errors import FarError

ENGINES = ("onnxruntime",)
DEFAULT_ENGINE = "onnxruntime"


def open_engine(bundle: Bundle, name: str = DEFAULT_ENGINE, threads: int | None = None) -> Engine:
    """The engine `name` (library, or library:provider) over a bundle; FarError for an unknown name or a library
    that is missing."""
    library, _, provider = name.partition(":")
    if library == "onnxruntime":
        from far_runtime.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, provider or "cpu", threads)
    raise FarError(f"engine {name!r}: unknown; known: {', '.join(ENGINES)} (with :cpu, :cuda or :tensorrt after it)")
