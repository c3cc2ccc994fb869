"""The part of TensorRT's Python API that the engine uses, on a SimulatedCuda; graphs are executed by ONNX Runtime.

A plan is bytes that name a bundle, one of its graphs and shape profiles (`plan_of`). Names and arguments are the real
ones; test_interfaces.py compares them with the real modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from far_runtime.bundle import Bundle, Graph, TensorSpec, open_bundle
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.onnxruntime import OnnxRuntimeEngine
from simulated_cuda import ALIGNMENT, SimulatedCuda, SimulatorError, cudaError_t

MAGIC = b"simulated plan "
VERSION = "10.13.0"


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    UINT8 = 5
    INT64 = 8


DATA_TYPES = {"float32": DataType.FLOAT, "int64": DataType.INT64, "uint8": DataType.UINT8}


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY = 0
    EAGER = 1


class ILogger:
    INTERNAL_ERROR: ClassVar[int] = 0
    ERROR: ClassVar[int] = 1

    def __init__(self) -> None: ...

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]


def plan_of(
    bundle: Bundle, graph: Graph, profiles: Sequence[Mapping[str, tuple[int, int, int]]] = (), **more: Any
) -> bytes:
    """The plan of a bundle's graph. profiles: sizes by axis; the graph's own where none is given.

    more: version; scratch (bytes); refittable; stripped (without weights); streamable (bytes of weights); dtypes (by
    tensor, other than the graph's); capturable; host (tensors that lie on the host); renamed (tensors by new name).
    """
    return (
        MAGIC
        + json.dumps(
            {
                "bundle": str(bundle.path),
                "graph": graph.name,
                "profiles": [_profile(graph, {**graph.profile, **sizes}) for sizes in profiles or [{}]],
                "version": VERSION,
                "scratch": 1000,
                **more,
            }
        ).encode()
    )


def _profile(graph: Graph, axes: Mapping[str, tuple[int, int, int]]) -> Profile:
    def shape(spec: TensorSpec, which: int) -> Shape:
        return tuple(axes[axis][which] if isinstance(axis, str) else axis for axis in spec.shape)

    return {spec.name: (shape(spec, 0), shape(spec, 1), shape(spec, 2)) for spec in graph.inputs}


class Device:
    """What a simulated library runs on: memory and streams, ONNX Runtime for the graphs, and counters for tests."""

    def __init__(self, cuda: SimulatedCuda, rtx: bool, version: str) -> None:
        self.cuda, self.rtx, self.version = cuda, rtx, version
        self.contexts = 0
        self.executions: list[str] = []
        self.shape_changes = 0
        self.address_changes = 0
        self._bundles: dict[str, tuple[Bundle, OnnxRuntimeEngine]] = {}
        self._shapes: dict[tuple[Any, ...], dict[str, Shape]] = {}

    def bundle(self, path: str) -> tuple[Bundle, OnnxRuntimeEngine]:
        if path not in self._bundles:
            bundle = open_bundle(path, check=False)
            self._bundles[path] = (bundle, OnnxRuntimeEngine(bundle, "cpu", EngineOptions(threads=1)))
        return self._bundles[path]

    def compute(self, path: str, graph: Graph, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        """The graph's outputs by ONNX Runtime's engine, session options and all."""
        _, engine = self.bundle(path)
        outputs = engine.run(graph.stage, {name: engine.put(a) for name, a in inputs.items()}, graph.constants)
        return {name: engine.get(array) for name, array in outputs.items()}

    def output_shapes(self, path: str, graph: Graph, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Of the graph's outputs, from its axes or, where those are of outputs alone, from a trial."""
        key = (path, graph.name, tuple(sorted(shapes.items())))
        if key not in self._shapes:
            sizes: dict[int | str, int] = {}
            for spec in graph.inputs:
                sizes |= dict(zip(spec.shape, shapes[spec.name], strict=True))
            axes = {axis for spec in graph.outputs for axis in spec.shape if isinstance(axis, str)}
            if axes <= sizes.keys():
                made = {s.name: tuple(sizes[a] if isinstance(a, str) else a for a in s.shape) for s in graph.outputs}
            else:
                zeros = {spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in graph.inputs}
                made = {name: array.shape for name, array in self.compute(path, graph, zeros).items()}
            self._shapes[key] = made
        return self._shapes[key]


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: ILogger, *, _device: Device) -> None:
        self._logger, self._device = logger, _device

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if not bytes(serialized_engine).startswith(MAGIC):
            self._logger.log(ILogger.ERROR, "deserializeCudaEngine: Serialization assertion failed (magic tag)")
            return None
        try:
            plan = json.loads(serialized_engine[len(MAGIC) :])
        except ValueError:
            self._logger.log(ILogger.ERROR, "deserializeCudaEngine: unexpected end of the buffer")
            return None
        if plan.get("version_compatible"):
            if not self.engine_host_code_allowed:
                self._logger.log(ILogger.ERROR, "The engine has host code, which is not allowed")
                return None
        elif plan["version"] != self._device.version:
            self._logger.log(ILogger.ERROR, f"The engine plan file is of version {plan['version']}")
            return None
        return ICudaEngine(plan, _device=self._device, _logger=self._logger)


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> None:
        self._strategy = strategy


class RtxRuntimeConfig(IRuntimeConfig):
    """With what TensorRT-RTX has beside."""

    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY


class ICudaEngine:
    def __init__(self, _plan: dict[str, Any], *, _device: Device, _logger: ILogger) -> None:
        self._plan, self._device, self._logger = _plan, _device, _logger
        bundle, _ = _device.bundle(_plan["bundle"])
        self._graph = next(graph for graph in bundle.manifest.graphs if graph.name == _plan["graph"])
        renamed = _plan.get("renamed", {})
        self._names = [renamed.get(s.name, s.name) for s in (*self._graph.inputs, *self._graph.outputs)]
        self._has_weights = not _plan.get("stripped")
        self._budget = self.streamable_weights_size
        self._contexts = 0

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan["profiles"])

    @property
    def device_memory_size_v2(self) -> int:
        return int(self._plan["scratch"])

    @property
    def refittable(self) -> bool:
        return bool(self._plan.get("refittable") or self._plan.get("stripped"))

    @property
    def streamable_weights_size(self) -> int:
        return int(self._plan.get("streamable", 0))

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        if self._contexts:
            raise SimulatorError("the budget cannot change once there are execution contexts")
        self._budget = value

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        if name not in self._names:
            return TensorIOMode.NONE
        return TensorIOMode.INPUT if self._names.index(name) < len(self._graph.inputs) else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._plan.get("dtypes", {}).get(name, DATA_TYPES[self._spec(name).dtype].name)]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._plan.get("host", ()) else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return list(self._plan["profiles"][profile_index][name])

    def create_runtime_config(self) -> IRuntimeConfig:
        return RtxRuntimeConfig() if self._device.rtx else IRuntimeConfig()

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy | IRuntimeConfig = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext | None:
        chosen = strategy._strategy if isinstance(strategy, IRuntimeConfig) else strategy
        if chosen != ExecutionContextAllocationStrategy.USER_MANAGED:
            raise SimulatorError("the context would allocate scratch memory of its own")
        if self._device.rtx:
            wanted = DynamicShapesKernelSpecializationStrategy.EAGER
            if getattr(strategy, "dynamic_shapes_kernel_specialization_strategy", None) != wanted:
                raise SimulatorError("kernels may be compiled while a graph is captured")
        if self._plan.get("no_context"):
            return None
        self._contexts += 1
        self._device.contexts += 1
        return (RtxExecutionContext if self._device.rtx else IExecutionContext)(_engine=self)

    def _spec(self, name: str) -> TensorSpec:
        specs = (*self._graph.inputs, *self._graph.outputs)
        return specs[self._names.index(name)]


class IExecutionContext:
    def __init__(self, *, _engine: ICudaEngine) -> None:
        self._engine, self._device, self._graph = _engine, _engine._device, _engine._graph
        self._profile = 0
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None
        self._settled = False
        """Whether it has been enqueued since its shapes, profile or scratch memory changed."""

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < self._engine.device_memory_size_v2:
            raise SimulatorError(f"{size} bytes of scratch memory, needs {self._engine.device_memory_size_v2}")
        if size:
            self._device.cuda.bytes_at(memory, size, "device")
        self._scratch, self._settled = (memory, size), False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            return self._fail(f"no profile {profile_index}")
        if self._device.cuda.stream(stream_handle).captured is not None:
            raise SimulatorError("the profile is set during a capture")
        self._profile, self._shapes, self._settled = profile_index, {}, False
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        low, _, high = self._engine._plan["profiles"][self._profile].get(name, ((), (), ()))
        if self._engine.get_tensor_mode(name) != TensorIOMode.INPUT or len(low) != len(shape):
            return self._fail(f"setInputShape: {name} {shape}")
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return self._fail(f"setInputShape: {name} {shape} is outside of profile {self._profile}")
        self._device.shape_changes += 1
        self._shapes[name], self._settled = tuple(shape), False
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        if self._engine.get_tensor_mode(name) == TensorIOMode.INPUT:
            return self._shapes.get(
                name, tuple(-1 if isinstance(a, str) else a for a in self._engine._spec(name).shape)
            )
        if missing := [spec.name for spec in self._graph.inputs if spec.name not in self._shapes]:
            raise SimulatorError(f"the shape of {name} is asked for before that of {missing[0]} is set")
        return self._device.output_shapes(self._engine._plan["bundle"], self._graph, self._shapes)[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._names:
            return self._fail(f"setTensorAddress: {name}")
        if not memory or memory % ALIGNMENT:
            raise SimulatorError(f"{name}: address {memory:#x} is null or not a multiple of {ALIGNMENT}")
        self._device.address_changes += 1
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = self._device.cuda.stream(stream_handle)
        for spec in (*self._graph.inputs, *self._graph.outputs):
            if spec.name not in self._addresses:
                return self._fail(f"enqueueV3: the address of {spec.name} is not set")
        if self._scratch is None:
            return self._fail("enqueueV3: no device memory is set")
        if not self._engine._has_weights:
            return self._fail("enqueueV3: the engine has no weights; refit it first")
        if self._device.cuda.pending_error != cudaError_t.cudaSuccess:
            return self._fail(f"enqueueV3: Cuda failure {self._device.cuda.pending_error.name}")
        if stream.captured is not None and not self._settled:
            self._device.cuda.spoil(stream)
            return self._fail("enqueueV3: captured before it was enqueued with these shapes")
        self._settled = True
        self._device.cuda.enqueue(stream, self._work())
        return True

    def _work(self) -> Any:
        """One execution, as it was bound when it was enqueued."""
        cuda, graph, path, name = self._device.cuda, self._graph, self._engine._plan["bundle"], self._graph.name
        inputs = {
            spec.name: (self._addresses[spec.name], self.get_tensor_shape(spec.name), spec.dtype)
            for spec in graph.inputs
        }
        outputs = {
            spec.name: (self._addresses[spec.name], self.get_tensor_shape(spec.name), spec.dtype)
            for spec in graph.outputs
        }
        scratch = self._scratch or (0, 0)
        ranges = [(address, _bytes(shape, dtype)) for address, shape, dtype in (*inputs.values(), *outputs.values())]
        written = [*ranges[len(inputs) :], scratch]

        def work() -> None:
            for i, (address, size) in enumerate(written):
                for other, length in [*ranges[: len(inputs)], *written[:i]]:
                    if address < other + length and other < address + size:
                        raise SimulatorError(f"graph {name}: memory that it writes overlaps with other memory of it")
            arrays = {}
            for key, (address, shape, dtype) in inputs.items():
                size = _bytes(shape, dtype)
                there = cuda.bytes_at(address, size, "device") if size else np.zeros(0, np.uint8)
                arrays[key] = there.copy().view(dtype).reshape(shape)
            if scratch[1]:
                cuda.bytes_at(*scratch, "device")[:] = 0x5A  # whoever keeps something there loses it
            for key, array in self._device.compute(path, graph, arrays).items():
                address, shape, dtype = outputs[key]
                if array.shape != shape or array.dtype != dtype:
                    raise SimulatorError(f"graph {name}: {key} came out as {array.dtype} {array.shape}")
                if array.nbytes:
                    cuda.bytes_at(address, array.nbytes, "device")[:] = np.frombuffer(array.tobytes(), np.uint8)
            self._device.executions.append(name)

        return work

    def _fail(self, said: str) -> bool:
        self._engine._logger.log(ILogger.ERROR, said)
        return False


class RtxExecutionContext(IExecutionContext):
    """With what TensorRT-RTX has beside."""

    def is_stream_capturable(self, stream: int) -> bool:
        return bool(self._engine._plan.get("capturable", True))


def _bytes(shape: Shape, dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine, self._logger = engine, logger
        self._given = False

    def refit_cuda_engine(self) -> bool:
        self._engine._has_weights = self._given
        return self._given


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter, self._logger = refitter, logger

    def refit_from_file(self, model: str) -> bool:
        engine = self._refitter._engine
        if Path(model) != Path(engine._plan["bundle"]) / engine._graph.file or not Path(model).is_file():
            self._logger.log(ILogger.ERROR, f"refitFromFile: {model} is not what the engine was built from")
            return False
        self._refitter._given = True
        return True


CLASSES: dict[str, tuple[type, ...]] = {
    "Runtime": (Runtime,),
    "ICudaEngine": (ICudaEngine,),
    "IExecutionContext": (IExecutionContext,),
    "IRuntimeConfig": (IRuntimeConfig,),
    "Refitter": (Refitter,),
    "OnnxParserRefitter": (OnnxParserRefitter,),
    "ILogger": (ILogger,),
    "TensorIOMode": (TensorIOMode,),
    "TensorLocation": (TensorLocation,),
    "DataType": (DataType,),
    "ExecutionContextAllocationStrategy": (ExecutionContextAllocationStrategy,),
}
RTX_CLASSES: dict[str, tuple[type, ...]] = {
    **CLASSES,
    "IExecutionContext": (IExecutionContext, RtxExecutionContext),
    "IRuntimeConfig": (IRuntimeConfig, RtxRuntimeConfig),
    "DynamicShapesKernelSpecializationStrategy": (DynamicShapesKernelSpecializationStrategy,),
}


def simulated_tensorrt(device: Device) -> Any:
    """Stands in for the module tensorrt, or tensorrt_rtx."""
    classes = {name: kinds[0] for name, kinds in (RTX_CLASSES if device.rtx else CLASSES).items()}

    class BoundRuntime(Runtime):
        def __init__(self, logger: ILogger) -> None:
            super().__init__(logger, _device=device)

    return SimpleNamespace(__version__=device.version, **{**classes, "Runtime": BoundRuntime})
