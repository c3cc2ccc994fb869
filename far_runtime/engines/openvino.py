"""OpenVINO engine: one compiled model per graph, made when first used; its tensors pass from stage to stage."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import Bundle, Graph
from far_runtime.engines.base import Array, EngineOptions, scalar
from far_runtime.errors import FarError

PRECISIONS = {"f32": "f32", "bf16": "bf16", "f16": "f16"}
DEFAULT_PRECISION = "f32"


@dataclass(frozen=True)
class _Loaded:
    """A compiled graph and its one request."""

    request: Any
    graph: Graph


class OpenVinoEngine:
    """Runs a bundle's graphs on an OpenVINO device: CPU, or an Intel GPU or NPU (not run on those by us).

    precision: what the device may compute in where the graph says float32: "f32" (the default here, so that pictures do
    not depend on the processor), "bf16" or "f16". Raises FarError where openvino is not installed or lacks the device.
    """

    def __init__(
        self, bundle: Bundle, device: str = "cpu", precision: str = "", options: EngineOptions | None = None
    ) -> None:
        try:
            self._ov: Any = importlib.import_module("openvino")
        except ImportError:
            raise FarError("openvino is not installed; install it with: pip install 'far-deploy[openvino]'") from None
        options = options or EngineOptions()
        precision = precision or DEFAULT_PRECISION
        if precision not in PRECISIONS:
            raise FarError(f"engine openvino:{device}:{precision}: unknown precision; known: {', '.join(PRECISIONS)}")
        self._core = self._ov.Core()
        self._device = device.upper()
        available = self._core.available_devices
        if not any(name.partition(".")[0] == self._device.partition(".")[0] for name in available):
            raise FarError(
                f"engine openvino:{device}: this machine has no such device; it has "
                f"{', '.join(name.lower() for name in available)}: use openvino:{available[0].lower()}, say"
            )
        self.name = f"openvino:{device}" + ("" if precision == DEFAULT_PRECISION else f":{precision}")
        self.version: str = self._ov.__version__.partition("-")[0]
        self._bundle = bundle
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if self._device == "CPU":
            # Without its cache of kernels: attention over a length that changes from call to call (VAR's keys so far)
            # took a kernel made for another length and was wrong, in 2026.4 at least.
            self._settings["CPU_RUNTIME_CACHE_CAPACITY"] = "0"
            if options.threads:
                self._settings["INFERENCE_NUM_THREADS"] = options.threads
        self._loaded: dict[str, _Loaded] = {}

    def put(self, array: NDArray[Any]) -> Array:
        # A tensor of its own: the caller may change or drop its array.
        return self._ov.Tensor(np.array(array, order="C", copy=True))

    def get(self, array: Array) -> NDArray[Any]:
        host: NDArray[Any] = array.data
        return host

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        constants = constants or {}
        loaded = self._load(self._bundle.manifest.graph(stage, constants))
        sizes: dict[str, int] = {}
        for spec in loaded.graph.inputs:
            tensor = inputs[spec.name] if spec.name in inputs else self.put(scalar(constants[spec.name], np.int64))
            sizes |= {axis: size for axis, size in zip(spec.shape, tensor.shape, strict=True) if isinstance(axis, str)}
            loaded.request.set_tensor(spec.name, tensor)
        outputs = {}
        for spec in loaded.graph.outputs:
            if all(axis in sizes for axis in spec.shape if isinstance(axis, str)):
                # A new tensor each time: the one of the last call is still in use as another stage's input.
                shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
                outputs[spec.name] = self._ov.Tensor(self._ov.Type(np.dtype(spec.dtype)), self._ov.Shape(shape))
                loaded.request.set_tensor(spec.name, outputs[spec.name])
        loaded.request.infer()
        # An axis that no input has (keys so far and new ones) is known only now: such an output is copied.
        return {
            spec.name: outputs.get(spec.name) or self.put(loaded.request.get_tensor(spec.name).data)
            for spec in loaded.graph.outputs
        }

    def close(self) -> None:
        self._loaded.clear()

    def _load(self, graph: Graph) -> _Loaded:
        if graph.name not in self._loaded:
            path: Path = self._bundle.path / graph.file
            try:
                compiled = self._core.compile_model(str(path), self._device, self._settings)
            except RuntimeError as error:
                detail = str(error).strip().splitlines()[-1]
                raise FarError(
                    f"{path}: openvino {self.version} does not compile it for {self._device} ({detail}); use another "
                    "--engine, or export the bundle again"
                ) from error
            self._loaded[graph.name] = _Loaded(compiled.create_infer_request(), graph)
        return self._loaded[graph.name]
