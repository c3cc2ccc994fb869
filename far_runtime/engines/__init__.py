"""Engines by name: `onnxruntime`, `onnxruntime:cuda`, `openvino`, `openvino:gpu:f16`, `tensorrt`, `tensorrt-rtx`."""

from __future__ import annotations

from far_runtime.bundle import Bundle
from far_runtime.engines.base import Engine, EngineOptions
from far_runtime.errors import FarError

ENGINES = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")


def open_engine(bundle: Bundle, name: str | None = None, options: EngineOptions | None = None) -> Engine:
    """The engine `name` (library, library:device, or openvino:device:precision) over a bundle; FarError for an unknown
    name or a library that is missing. None: the one of `choice.choose`."""
    options = options or EngineOptions()
    if name is None:
        from far_runtime.engines.select import choose

        name = choose(bundle).name
    library, _, device = name.partition(":")
    if library == "onnxruntime":
        from far_runtime.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, device or "cpu", options)
    if library == "openvino":
        from far_runtime.engines.openvino import OpenVinoEngine

        device, _, precision = device.partition(":")
        return OpenVinoEngine(bundle, device or "cpu", precision, options)
    if library in ("tensorrt", "tensorrt-rtx") and not device:
        from far_runtime.engines.cache.compatibility import cached_plans
        from far_runtime.engines.tensorrt.engine import TensorRtEngine

        return TensorRtEngine(bundle, library, cached_plans(bundle, library), options)
    raise FarError(
        f"engine {name!r}: unknown; known: {', '.join(ENGINES)}; with :cuda, :tensorrt, :tensorrt-rtx or :openvino "
        "after onnxruntime, with :gpu or :npu after openvino"
    )
