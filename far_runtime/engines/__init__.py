"""Engines by name: `onnxruntime`, `onnxruntime:cuda`, `openvino`, `openvino:gpu:f16`, `tensorrt`, `tensorrt-rtx`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from far_runtime.bundle import Bundle
from far_runtime.engines.base import Engine, EngineOptions
from far_runtime.errors import FarError

if TYPE_CHECKING:
    from far_runtime.engines.select import Choice

ENGINES = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")


def open_engine(bundle: Bundle, engine: str | Choice | None = None, options: EngineOptions | None = None) -> Engine:
    """An engine over a bundle: the one of that name (library, library:device, or openvino:device:precision), or the one
    that `select.choose` chose, or the best one here. Raises FarError for an unknown name and a missing library."""
    from far_runtime.engines.select import Choice, best_unless

    choice = engine if isinstance(engine, Choice) else best_unless(engine, bundle)
    options, name = options or EngineOptions(), choice.name
    library, _, device = name.partition(":")
    if library == "onnxruntime":
        from far_runtime.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, device or "cpu", options)
    if library == "openvino":
        from far_runtime.engines.openvino import OpenVinoEngine

        device, _, precision = device.partition(":")
        return OpenVinoEngine(bundle, device or "cpu", precision, options)
    if library in ("tensorrt", "tensorrt-rtx") and not device:
        from far_runtime.engines.cache.compatibility import engine_file_reader
        from far_runtime.engines.tensorrt.engine import TensorRtEngine

        return TensorRtEngine(bundle, library, engine_file_reader(bundle, library, choice.cached), options)
    raise FarError(
        f"engine {name!r}: unknown; known: {', '.join(ENGINES)}; with :cuda, :tensorrt, :tensorrt-rtx or :openvino "
        "after onnxruntime, with :gpu or :npu after openvino"
    )
