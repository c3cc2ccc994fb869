"""TensorRT engine: compiled graphs on one stream, arrays on the device from the first noise to the last picture.

TensorRT 10.3 to 11 and TensorRT-RTX by one path. Not run on a GPU by us: tests/simulator stands in for both libraries.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import Bundle, Graph
from far_runtime.engines.base import Array, EngineOptions, Generate, scalar
from far_runtime.engines.cache.compatibility import EXTRAS, MODULES
from far_runtime.engines.tensorrt.cuda import CaptureFailed, Cuda, load_cuda
from far_runtime.engines.tensorrt.cuda_graphs import Contexts, EagerSession, GraphCache, Session
from far_runtime.engines.tensorrt.device_memory import ArrayMemory, BufferPool, DeviceArray
from far_runtime.engines.tensorrt.executor import Executor
from far_runtime.errors import FarError

if TYPE_CHECKING:
    import tensorrt as trt

DTYPES = ("float32", "int64", "uint8")


def load_libraries(library: str) -> tuple[Any, Any]:
    """The modules of TensorRT or TensorRT-RTX and of cuda-python; FarError where one is not installed."""
    try:
        module = importlib.import_module(MODULES[library])
    except (ImportError, OSError):  # OSError: its shared libraries are missing
        module = None
    if not hasattr(module, "Runtime"):  # stubs alone can be imported too, as an empty module
        raise FarError(
            f"{library} is not installed; install it with: pip install 'far-deploy[{EXTRAS[library]}]' (on Jetson it "
            "comes with the system: make the virtual environment with --system-site-packages)"
        )
    return module, load_cuda()


class TensorRtEngine:
    """Runs a bundle's graphs, compiled by `far build`, on an NVIDIA GPU.

    library: "tensorrt" or "tensorrt-rtx".
    read_engine_file: returns the serialised engine of a graph, by the graph's name.
    All of them are loaded at once, so that they share one scratch memory. Raises FarError where a library or the GPU
    is missing, and for engine files that do not fit.
    """

    def __init__(
        self,
        bundle: Bundle,
        library: str,
        read_engine_file: Callable[[str], bytes],
        options: EngineOptions | None = None,
    ) -> None:
        self._library, cuda_python = load_libraries(library)
        self.name = library
        self.version: str = self._library.__version__
        self._bundle = bundle
        self._options = options or EngineOptions()
        self._hint = f"build it again with: far build {bundle.path} --engine {library}"
        self._cuda = Cuda(cuda_python)
        self._log = error_logger(self._library)
        self._runtime: trt.Runtime = self._library.Runtime(self._log)
        # Version-compatible engines carry a runtime of their own. The cache compares the SHA-256 of its engine files.
        self._runtime.engine_host_code_allowed = True
        self._executors = {
            graph.name: self._load(graph, read_engine_file(graph.name)) for graph in bundle.manifest.graphs
        }
        scratch = max([executor.activation_size for executor in self._executors.values()], default=0)
        self._scratch = self._cuda.malloc(max(scratch, 1))
        for executor in self._executors.values():
            executor.use_scratch(self._scratch, scratch)
        self._memory = ArrayMemory(self._cuda, reuse=True)
        # Scalars stay on the device, so they have their own pool: they would take buffers that later pictures need.
        self._scalars: dict[int, DeviceArray] = {}
        self._scalar_pool = BufferPool(self._cuda)
        self._graphs = GraphCache(self, self._cuda)
        self._cuda.free_unused = lambda: self._graphs.evict_oldest() or self._memory.pool.trim()
        self.session: Session = EagerSession(self, self._memory)

    @property
    def allocations(self) -> int:
        """How often device memory or pinned memory was allocated."""
        return self._cuda.allocations

    @property
    def smallest_batch(self) -> int:
        """The fewest pictures that all graphs were compiled for."""
        return max((executor.smallest("batch") for executor in self._executors.values()), default=1)

    def put(self, array: NDArray[Any]) -> Array:
        array = np.asarray(array)
        if array.dtype.name not in DTYPES:
            raise FarError(f"array of {array.dtype}: graphs take {', '.join(DTYPES)}")
        return self.session.put(array)

    def get(self, array: Array) -> NDArray[Any]:
        return self.session.get(array)

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        return self.session.run(stage, inputs, constants or {})

    def run_generation(self, key: Hashable, generate: Generate) -> dict[str, NDArray[Any]]:
        """Run a whole generation. Of the same key, the second is captured as a CUDA graph, and later ones replay it."""
        arrays = self._graphs.run_generation(self, key, generate) if self._options.cuda_graph else None
        return self._memory.read(dict(generate(self))) if arrays is None else arrays

    def synchronize(self) -> None:
        """Wait until all work on the stream is done, as far bench does after every stage."""
        self._cuda.synchronize()

    def execute(
        self,
        stage: str,
        inputs: Mapping[str, DeviceArray],
        constants: Mapping[str, int],
        memory: ArrayMemory,
        contexts: Contexts | None,
    ) -> dict[str, DeviceArray]:
        """Enqueue a stage on the stream. Its outputs lie in `memory`, and `contexts` keeps its execution context."""
        graph = self._bundle.manifest.graph(stage, constants)
        arrays = {
            spec.name: inputs[spec.name] if spec.name in inputs else self._scalar(constants[spec.name])
            for spec in graph.inputs
        }
        for spec in graph.inputs:
            array = arrays[spec.name]
            if array.dtype.name != spec.dtype or len(array.shape) != len(spec.shape):
                raise FarError(
                    f"graph {graph.name}: {spec.name} is {array.dtype.name} {list(array.shape)}, expected {spec.dtype} "
                    f"[{', '.join(str(axis) for axis in spec.shape)}]"
                )
        executor = self._executors[graph.name]
        shapes = tuple(arrays[spec.name].shape for spec in graph.inputs)
        try:
            context = executor.context(shapes, contexts)
            outputs = {
                spec.name: memory.pool.array(np.dtype(spec.dtype), shape)
                for spec, shape in zip(graph.outputs, context.outputs, strict=True)
            }
            context.run({name: array.address for name, array in {**arrays, **outputs}.items()}, self._cuda)
        except FarError as error:
            raise FarError(error.message, self._log.take_error()) from None
        return outputs

    def close(self) -> None:
        self._cuda.synchronize()
        self._graphs.close()
        self._scalars.clear()
        for executor in self._executors.values():
            executor.close()
        self._memory.close()
        self._scalar_pool.close()
        if self._scratch:
            self._cuda.free(self._scratch)
            self._cuda.close()
        self._executors, self._scratch = {}, 0

    def _scalar(self, value: int) -> DeviceArray:
        """A constant as an input [1] of a graph; each value is uploaded once."""
        if value not in self._scalars:
            if self._cuda.capturing:
                raise CaptureFailed(f"the constant {value} is new")
            self._scalars[value] = self._memory.staging.put(scalar(value, np.int64), self._scalar_pool)[0]
        return self._scalars[value]

    def _load(self, graph: Graph, engine_file: bytes) -> Executor:
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(engine_file)
        if engine is None:
            raise FarError(
                f"graph {graph.name}: {self.name} {self.version} does not load its engine{self._log.take_error()}; it "
                f"was built by another version, for another GPU, or is damaged: {self._hint}"
            )
        if engine.refittable:
            self._refit(engine, graph)
        if engine.streamable_weights_size and self._options.weight_budget is not None:
            engine.weight_streaming_budget_v2 = min(self._options.weight_budget << 20, engine.streamable_weights_size)
        return Executor(self._library, engine, graph, self._cuda, self._hint)

    def _refit(self, engine: trt.ICudaEngine, graph: Graph) -> None:
        """Give an engine the bundle's weights, which its engine file may lack."""
        path = self._bundle.path / graph.file
        refitter = self._library.Refitter(engine, self._log)
        parser = self._library.OnnxParserRefitter(refitter, self._log)
        if not (parser.refit_from_file(str(path)) and refitter.refit_cuda_engine()):
            raise FarError(
                f"graph {graph.name}: its engine does not take the weights of {path}{self._log.take_error()}; "
                f"{self._hint}"
            )


def error_logger(library: Any) -> Any:
    """A TensorRT logger that keeps the last error, for error messages."""

    class ErrorLogger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self._last = ""

        def log(self, severity: Any, msg: str) -> None:
            if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                self._last = msg.strip()

        def take_error(self) -> str:
            """The last error in brackets, which is forgotten then; "" where there was none."""
            last, self._last = self._last, ""
            return f" ({last})" if last else ""

    return ErrorLogger()
