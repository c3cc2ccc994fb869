"""One compiled graph on TensorRT: prepare (profile, shapes, addresses), then enqueue. Not run on a GPU by us."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from far_runtime.bundle import Graph, TensorSpec
from far_runtime.engines.tensorrt.cuda import Cuda
from far_runtime.errors import FarError, Message, SettingName

if TYPE_CHECKING:
    import tensorrt as trt

Shapes = tuple[tuple[int, ...], ...]
"""Shapes of a graph's inputs or outputs, in the manifest's order."""

DTYPES = {"FLOAT": "float32", "INT64": "int64", "UINT8": "uint8"}
"""What TensorRT calls the dtypes of stage inputs and outputs."""

MAX_CONTEXTS = 64
"""Most execution contexts of a graph that are kept, besides those of captured generations."""


class Context:
    """An execution context for one set of input shapes, which never change.

    There is one for each set of shapes, for two reasons: a context whose shapes change has to be enqueued once before
    it can be captured again, and a captured graph reads the shape data that the context had put on the device.
    """

    def __init__(self, context: trt.IExecutionContext, graph: Graph, shapes: Shapes, outputs: Shapes) -> None:
        self.shapes, self.outputs = shapes, outputs
        self._context, self._graph = context, graph
        self._bound: dict[str, int] = {}

    def run(self, addresses: Mapping[str, int], cuda: Cuda) -> None:
        """Enqueue the graph on the stream. addresses: of its inputs and outputs on the device, by name."""
        for name, address in addresses.items():
            if self._bound.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise FarError(f"graph {self._graph.name}: TensorRT does not take the address of {name}")
                self._bound[name] = address
        if cuda.capturing and not getattr(self._context, "is_stream_capturable", lambda stream: True)(int(cuda.stream)):
            raise FarError(
                f"graph {self._graph.name} of this engine cannot be captured in a CUDA graph; use ",
                SettingName("no_cuda_graph"),
            )
        if not self._context.execute_async_v3(int(cuda.stream)):
            raise FarError(f"graph {self._graph.name}: TensorRT did not run it")


class Executor:
    """A deserialised engine and its execution contexts, one for each set of input shapes."""

    def __init__(self, library: Any, engine: trt.ICudaEngine, graph: Graph, cuda: Cuda, hint: str) -> None:
        """FarError where the engine's inputs and outputs are not those of the manifest's graph.

        hint: how to build the engine again, for error messages.
        """
        self.graph, self.hint = graph, hint
        self._library, self._engine, self._cuda = library, engine, cuda
        self._contexts: OrderedDict[Shapes, Context] = OrderedDict()
        self._activation = (0, 0)
        self._check_tensors()
        # [profile][input][lowest, usual, highest]
        self._profiles = [
            [[sizes_of(shape) for shape in engine.get_tensor_profile_shape(spec.name, i)] for spec in graph.inputs]
            for i in range(engine.num_optimization_profiles)
        ]

    @property
    def activation_size(self) -> int:
        """Bytes of scratch memory that any of its profiles needs."""
        return activation_size(self._engine)

    def smallest(self, axis: str) -> int:
        """The smallest size of an axis that any of its profiles takes; 1 where no input has that axis."""
        sizes = [
            lowest[j]
            for profile in self._profiles
            for spec, (lowest, _, _) in zip(self.graph.inputs, profile, strict=True)
            for j, name in enumerate(spec.shape)
            if name == axis
        ]
        return min(sizes, default=1)

    def use_scratch(self, address: int, size: int) -> None:
        """Give later contexts their scratch memory. All graphs share it, since they never run at the same time."""
        self._activation = (address, size)

    def context(self, shapes: Shapes, keep: dict[tuple[str, Shapes], Context] | None = None) -> Context:
        """The context for inputs of these shapes, created where there is none.

        keep: the contexts of a captured generation, which has to keep them for as long as its graph lives.
        Raises FarError for shapes that no profile of the engine takes.
        """
        name = (self.graph.name, shapes)
        context = self._contexts.get(shapes) or (keep or {}).get(name) or self._create(shapes)
        self._contexts[shapes] = context
        self._contexts.move_to_end(shapes)
        if len(self._contexts) > MAX_CONTEXTS:
            self._contexts.popitem(last=False)
        if keep is not None:
            keep[name] = context
        return context

    def close(self) -> None:
        self._contexts.clear()

    def _create(self, shapes: Shapes) -> Context:
        profile = self._profile_for(shapes)
        context = create_context(self._library, self._engine)
        if context is None:
            raise FarError(
                f"graph {self.graph.name}: TensorRT made no execution context, most likely for lack of memory"
            )
        context.set_device_memory(*self._activation)
        if profile and not context.set_optimization_profile_async(profile, int(self._cuda.stream)):
            raise FarError(f"graph {self.graph.name}: TensorRT does not take its profile {profile}")
        for spec, shape in zip(self.graph.inputs, shapes, strict=True):
            if not context.set_input_shape(spec.name, shape):
                raise FarError(
                    f"graph {self.graph.name}: TensorRT does not take the shape {list(shape)} of {spec.name}"
                )
        outputs = tuple(sizes_of(context.get_tensor_shape(spec.name)) for spec in self.graph.outputs)
        for spec, shape in zip(self.graph.outputs, outputs, strict=True):
            if any(size < 0 for size in shape):
                raise FarError(f"graph {self.graph.name}: the shape of {spec.name} depends on data; {self.hint}")
        return Context(context, self.graph, shapes, outputs)

    def _profile_for(self, shapes: Shapes) -> int:
        """The tightest profile that takes these shapes."""
        suitable = [
            (sum(int(np.prod(high)) for _, _, high in profile), i)
            for i, profile in enumerate(self._profiles)
            if all(_within(shape, low, high) for shape, (low, _, high) in zip(shapes, profile, strict=True))
        ]
        if not suitable:
            raise FarError(self._mismatch(shapes), f"; {self.hint}")
        return min(suitable)[1]

    def _mismatch(self, shapes: Shapes) -> Message:
        """Which shapes do not fit the profiles: the first axis that no profile takes, or else all of them."""
        for i, (spec, shape) in enumerate(zip(self.graph.inputs, shapes, strict=True)):
            for j, size in enumerate(shape):
                ranges = sorted({(profile[i][0][j], profile[i][2][j]) for profile in self._profiles})
                if not any(low <= size <= high for low, high in ranges):
                    axis = spec.shape[j] if isinstance(spec.shape[j], str) else j
                    allowed = " or ".join(str(low) if low == high else f"{low} to {high}" for low, high in ranges)
                    fewer = (
                        ["; draw fewer at once with ", SettingName("batch_size")] if axis in ("batch", "rows") else []
                    )
                    return Message(
                        f"graph {self.graph.name}: axis {axis} of {spec.name} is {size}, its engine takes {allowed}",
                        *fewer,
                    )
        inputs = ", ".join(f"{spec.name} {list(shape)}" for spec, shape in zip(self.graph.inputs, shapes, strict=True))
        return Message(
            f"graph {self.graph.name}: none of its engine's {len(self._profiles)} profiles takes {inputs} at once"
        )

    def _check_tensors(self) -> None:
        engine, library, graph = self._engine, self._library, self.graph
        modes = {"input": library.TensorIOMode.INPUT, "output": library.TensorIOMode.OUTPUT}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for direction, specs in (("input", graph.inputs), ("output", graph.outputs)):
            names_there = sorted(name for name in names if engine.get_tensor_mode(name) == modes[direction])
            expected = sorted(spec.name for spec in specs)
            if names_there != expected:
                raise FarError(
                    f"graph {graph.name}: its engine has the {direction}s {', '.join(names_there)}, expected "
                    f"{', '.join(expected)}; {self.hint}"
                )
            for spec in specs:
                self._check_tensor(direction, spec)

    def _check_tensor(self, direction: str, spec: TensorSpec) -> None:
        dtype = self._engine.get_tensor_dtype(spec.name)
        if DTYPES.get(dtype.name) != spec.dtype:
            raise FarError(
                f"graph {self.graph.name}: {direction} {spec.name} of its engine is {dtype.name}, expected "
                f"{spec.dtype}; {self.hint}"
            )
        if self._engine.get_tensor_location(spec.name) != self._library.TensorLocation.DEVICE:
            raise FarError(
                f"graph {self.graph.name}: its engine wants {direction} {spec.name} on the host; {self.hint}"
            )


def activation_size(engine: trt.ICudaEngine) -> int:
    """Bytes of scratch memory of an engine's contexts, over all profiles."""
    name = "device_memory_size_v2" if hasattr(engine, "device_memory_size_v2") else "device_memory_size"
    return int(getattr(engine, name))


def create_context(library: Any, engine: trt.ICudaEngine) -> trt.IExecutionContext | None:
    """An execution context without scratch memory of its own.

    TensorRT-RTX compiles the kernels of a shape when it first meets the shape, by default in the background. A captured
    graph would then keep the slow kernels that are used meanwhile, so it is told to wait for the compiled ones.
    """
    strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
    specialization = getattr(library, "DynamicShapesKernelSpecializationStrategy", None)
    if specialization is None:
        return engine.create_execution_context(strategy)
    config: Any = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
    return engine.create_execution_context(config)


def sizes_of(dims: trt.Dims) -> tuple[int, ...]:
    """TensorRT's shape as a tuple; -1 for a size that is not known."""
    return tuple(int(dims[i]) for i in range(len(dims)))


def _within(shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> bool:
    return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
