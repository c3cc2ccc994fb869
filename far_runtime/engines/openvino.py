"""OpenVINO engine: one compiled model per graph, created at its first use; its tensors pass from stage to stage."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import WEIGHTS, Bundle, Graph
from far_runtime.engines.base import Array, EngineOptions, scalar
from far_runtime.engines.cache.entry import CachedEngine, EngineKey, bundle_facts
from far_runtime.engines.cache.store import EngineCache
from far_runtime.errors import FarError, SettingName
from far_runtime.machine.cpu import abilities, saturates
from far_runtime.machine.memory import unmapping

HINTS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
"""Values of INFERENCE_PRECISION_HINT, and the names of these precisions among a device's capabilities."""

NATIVE = {"fp16": "f16"}
"""The hint for a bundle's precision, where the device has it; f32 for all others.

Under f32 too, a BF16 graph's products are computed in BF16, and what the graph declares FP32 stays FP32. The hint bf16
would compute that in BF16."""


SUFFIX = ".blob"


@dataclass(frozen=True)
class _Loaded:
    """A compiled graph and its one inference request."""

    request: Any
    """OpenVINO's InferRequest."""
    graph: Graph
    sizes: Mapping[str, tuple[str, int]]
    """For each dynamic axis of the outputs, the input and dimension that has it; axes that no input has are absent."""
    bound: dict[str, Array]
    """Inputs that the request has already, by name."""


class OpenVinoEngine:
    """Runs a bundle's graphs on an OpenVINO device: CPU, or an Intel GPU or NPU (not run on those by us).

    precision: what the device computes in, "f32", "bf16" or "f16". Default: that of an FP16 bundle if the device has
    it, else f32, so that pictures of an FP32 bundle do not depend on the processor. Graphs that `far build`
    compiled for the same device, version and settings are loaded as they are. Raises FarError where openvino is not
    installed or lacks the device, or the device the precision.
    """

    def __init__(
        self, bundle: Bundle, device: str = "cpu", precision: str = "", options: EngineOptions | None = None
    ) -> None:
        try:
            self._ov: Any = importlib.import_module("openvino")
        except ImportError:
            raise FarError("openvino is not installed; install it with: pip install 'far-deploy[openvino]'") from None
        options = options or EngineOptions()
        if precision and precision not in HINTS:
            raise FarError(f"engine openvino:{device}:{precision}: unknown precision; known: {', '.join(HINTS)}")
        self._core = self._ov.Core()
        self._device = device.upper()
        available = self._core.available_devices
        if not any(name.partition(".")[0] == self._device.partition(".")[0] for name in available):
            raise FarError(
                f"engine openvino:{device}: this machine has no such device; it has "
                f"{', '.join(name.lower() for name in available)}: use openvino:{available[0].lower()}, say"
            )
        capabilities = self._core.get_property(self._device, "OPTIMIZATION_CAPABILITIES")
        usual = NATIVE.get(bundle.manifest.precision, "f32")
        hint = precision or (usual if HINTS[usual] in capabilities else "f32")
        # OpenVINO would silently compute in f32.
        if hint != "f32" and HINTS[hint] not in capabilities:
            raise FarError(
                f"engine openvino:{device}:{precision}: this device does not compute in {hint}; use "
                f"{' or '.join(f'openvino:{device}:{name}' for name, known in HINTS.items() if known in capabilities)}"
            )
        self.name = f"openvino:{device}" + ("" if hint == usual == "f32" else f":{hint}")
        self.version: str = self._ov.__version__.partition("-")[0]
        self._bundle = bundle
        self._low_memory = options.low_memory
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": options.mode.upper(),
        }
        if self._device == "CPU":
            # Without its fused attention, whose kernel is kept by the first length's shape: over a length that changes
            # from call to call (VAR's keys so far) the cached kernel is wrong, in 2026.4 at least.
            self._settings["SNIPPETS_MODE"] = "DISABLE"
            if bundle.manifest.precision == "int8" and saturates(abilities()):
                # What INT8 rounds is rounded all the same, but multiplied in FP32.
                self._settings["LP_TRANSFORMS_MODE"] = "NO"
            if options.threads:
                self._settings["INFERENCE_NUM_THREADS"] = options.threads
            if options.pinning is not None:
                self._settings["ENABLE_CPU_PINNING"] = options.pinning
        self._loaded: dict[str, _Loaded] = {}
        self._scalars: dict[int, Array] = {}

    def put(self, array: NDArray[Any]) -> Array:
        # A copy: the caller may change or drop its array.
        return self._ov.Tensor(np.ascontiguousarray(array))

    def get(self, array: Array) -> NDArray[Any]:
        host: NDArray[Any] = array.data
        return host

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        constants = constants or {}
        graph = self._bundle.manifest.graph(stage, constants)
        if graph.name not in self._loaded:
            # OpenVINO packs the weights into its own memory, most of them when it first runs.
            read = self._cached.file(graph.name) if self._cached else self._bundle.path / WEIGHTS
            with unmapping(read):
                return self._run(self._load(graph), inputs, constants)
        return self._run(self._loaded[graph.name], inputs, constants)

    def _run(self, loaded: _Loaded, inputs: Mapping[str, Array], constants: Mapping[str, int]) -> dict[str, Array]:
        for spec in loaded.graph.inputs:
            tensor = inputs[spec.name] if spec.name in inputs else self._scalar(constants[spec.name])
            if loaded.bound.get(spec.name) is not tensor:
                loaded.request.set_tensor(spec.name, tensor)
                loaded.bound[spec.name] = tensor
        sizes = {axis: inputs[name].shape[place] for axis, (name, place) in loaded.sizes.items()}
        outputs = {}
        for spec in loaded.graph.outputs:
            # A new tensor each time: the one of the last call is still in use as another stage's input. An axis that no
            # input has (keys so far and new ones) starts with size 0, and the request makes it what it is.
            shape = [sizes.get(axis, 0) if isinstance(axis, str) else axis for axis in spec.shape]
            outputs[spec.name] = self._ov.Tensor(self._ov.Type(np.dtype(spec.dtype)), self._ov.Shape(shape))
            loaded.request.set_tensor(spec.name, outputs[spec.name])
        loaded.request.infer()
        return outputs

    def close(self) -> None:
        self._loaded.clear()

    def compile(self, report: Callable[[str], None]) -> CachedEngine:
        """Compile every graph into the engine cache, where later engines of the same settings find it."""

        def write(folder: Path) -> None:
            for graph in self._bundle.manifest.graphs:
                blob = self._compile_graph(graph).export_model()
                (folder / f"{graph.name}{SUFFIX}").write_bytes(blob.getvalue())
                report(f"compiled {graph.name}")

        return EngineCache(self._bundle, report).build(self._key, write)

    @property
    def _key(self) -> EngineKey:
        device = str(self._core.get_property(self._device, "FULL_DEVICE_NAME"))
        build = str(self._ov.__version__)
        facts = {"version": self.version, "build": build, "device": device, "flags": self._settings}
        return EngineKey("openvino", {**bundle_facts(self._bundle), **facts})

    @cached_property
    def _cached(self) -> CachedEngine | None:
        """The engine that `far build` compiled, its checksums compared; None where there is none.

        With low memory it is not used: OpenVINO copies the weights of a compiled graph, and maps those of a bundle.
        """
        if self._low_memory or not any(place.is_dir() for place in EngineCache(self._bundle).places):
            return None
        return EngineCache(self._bundle).find(self._key)

    def _load(self, graph: Graph) -> _Loaded:
        if self._low_memory:
            self._loaded.clear()
        compiled = self._import(self._cached, graph) if self._cached else self._compile_graph(graph)
        self._loaded[graph.name] = _Loaded(compiled.create_infer_request(), graph, _dynamic_axes(graph), {})
        return self._loaded[graph.name]

    def _scalar(self, value: int) -> Array:
        """A constant as an input [1] of a graph; each value is put once."""
        if value not in self._scalars:
            self._scalars[value] = self.put(scalar(value, np.int64))
        return self._scalars[value]

    def _import(self, cached: CachedEngine, graph: Graph) -> Any:
        """Load a graph that was compiled before; its file is memory-mapped where this openvino can do that."""
        if hasattr(self._ov, "tensor_from_file"):
            blob = self._ov.tensor_from_file(cached.file(graph.name))
            cached.check(graph.name, blob.data)
        else:
            blob = cached.read(graph.name)
        return self._core.import_model(blob, self._device, self._settings)

    def _compile_graph(self, graph: Graph) -> Any:
        path: Path = self._bundle.path / graph.file
        try:
            return self._core.compile_model(str(path), self._device, self._settings)
        except RuntimeError as error:
            detail = str(error).strip().splitlines()[-1]
            raise FarError(
                f"{path}: openvino {self.version} does not compile it for {self._device} ({detail}); use another ",
                SettingName("engine"),
                ", or export the bundle again",
            ) from error


def _dynamic_axes(graph: Graph) -> dict[str, tuple[str, int]]:
    """The first input and dimension that has each dynamic axis of the graph's outputs."""
    dynamic = {axis for spec in graph.outputs for axis in spec.shape if isinstance(axis, str)}
    sizes: dict[str, tuple[str, int]] = {}
    for spec in graph.inputs:
        for place, axis in enumerate(spec.shape):
            if axis in dynamic:
                sizes.setdefault(str(axis), (spec.name, place))
    return sizes
