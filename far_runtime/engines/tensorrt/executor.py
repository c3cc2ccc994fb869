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
"""Of a graph's inputs, in the manifest's order."""

DTYPES = {"FLOAT": "float32", "INT64": "int64", "UINT8": "uint8"}
"""What TensorRT calls the dtypes of stage inputs and outputs."""

RECENT = 64
"""Execution contexts that a graph keeps beside those of captured generations."""


class Context:
    """An execution context for one set of input shapes, which it keeps.

    A context whose shapes change has to be enqueued once before it can be captured again, and what it copies to the
    device for its shapes would be read when a captured graph is launched: so there is one for each set of shapes.
    """

    def __init__(self, context: trt.IExecutionContext, graph: Graph, shapes: Shapes, outputs: Shapes) -> None:
        self.shapes, self.outputs = shapes, outputs
        self._context, self._graph = context, graph
        self._bound: dict[str, int] = {}

    def run(self, addresses: Mapping[str, int], cuda: Cuda) -> None:
        """Put the graph's execution on the stream, on inputs and outputs at these addresses."""
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
    """A deserialized engine and its contexts.

    Raises FarError where its inputs and outputs are not those of the manifest's graph. The engine belongs to the
    bundle whose folder `hint` names, in words that say how to build it.
    """

    def __init__(self, library: Any, engine: trt.ICudaEngine, graph: Graph, cuda: Cuda, hint: str) -> None:
        self.graph, self.hint = graph, hint
        self._library, self._engine, self._cuda = library, engine, cuda
        self._recent: OrderedDict[Shapes, Context] = OrderedDict()
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

    def lend(self, address: int, size: int) -> None:
        """Scratch memory for contexts to come, the same for all graphs: they never run at the same time."""
        self._activation = (address, size)

    def context(self, shapes: Shapes, keep: dict[tuple[str, Shapes], Context] | None = None) -> Context:
        """The context for inputs of these shapes. keep: contexts that outlive the engine's own memory of recent ones.

        Raises FarError for shapes that no profile of the engine takes.
        """
        name = (self.graph.name, shapes)
        found = self._recent.get(shapes) or (keep or {}).get(name) or self._make(shapes)
        self._recent[shapes] = found
        self._recent.move_to_end(shapes)
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        if keep is not None:
            keep[name] = found
        return found

    def close(self) -> None:
        self._recent.clear()

    def _make(self, shapes: Shapes) -> Context:
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
        find_compatible = [
            (sum(int(np.prod(high)) for _, _, high in profile), i)
            for i, profile in enumerate(self._profiles)
            if all(_within(shape, low, high) for shape, (low, _, high) in zip(shapes, profile, strict=True))
        ]
        if not find_compatible:
            raise FarError(self._misfit(shapes), f"; {self.hint}")
        return min(find_compatible)[1]

    def _misfit(self, shapes: Shapes) -> Message:
        """What does not fit the profiles, by axis where that can be told."""
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
        said = ", ".join(f"{spec.name} {list(shape)}" for spec, shape in zip(self.graph.inputs, shapes, strict=True))
        return Message(
            f"graph {self.graph.name}: none of its engine's {len(self._profiles)} profiles takes {said} together"
        )

    def _check_tensors(self) -> None:
        engine, library, graph = self._engine, self._library, self.graph
        modes = {"input": library.TensorIOMode.INPUT, "output": library.TensorIOMode.OUTPUT}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for kind, specs in (("input", graph.inputs), ("output", graph.outputs)):
            there = sorted(name for name in names if engine.get_tensor_mode(name) == modes[kind])
            expected = sorted(spec.name for spec in specs)
            if there != expected:
                raise FarError(
                    f"graph {graph.name}: its engine has the {kind}s {', '.join(there)}, expected "
                    f"{', '.join(expected)}; {self.hint}"
                )
            for spec in specs:
                self._check_tensor(kind, spec)

    def _check_tensor(self, kind: str, spec: TensorSpec) -> None:
        there = self._engine.get_tensor_dtype(spec.name)
        if DTYPES.get(there.name) != spec.dtype:
            raise FarError(
                f"graph {self.graph.name}: {kind} {spec.name} of its engine is {there.name}, expected {spec.dtype}; "
                f"{self.hint}"
            )
        if self._engine.get_tensor_location(spec.name) != self._library.TensorLocation.DEVICE:
            raise FarError(f"graph {self.graph.name}: its engine wants {kind} {spec.name} on the host; {self.hint}")


def activation_size(engine: trt.ICudaEngine) -> int:
    """Bytes of scratch memory of an engine's contexts, over all profiles."""
    name = "device_memory_size_v2" if hasattr(engine, "device_memory_size_v2") else "device_memory_size"
    return int(getattr(engine, name))


def create_context(library: Any, engine: trt.ICudaEngine) -> trt.IExecutionContext | None:
    """An execution context without scratch memory of its own.

    TensorRT-RTX compiles kernels for every shape when it first meets it, and by default does so beside the computation:
    a captured graph would keep the slow kernels that stand in for them. It is told to wait for them.
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
    """A shape as TensorRT gives it; -1 where it is not known."""
    return tuple(int(dims[i]) for i in range(len(dims)))


def _within(shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> bool:
    return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
