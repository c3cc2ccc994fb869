"""A Triton server in host memory, as far as a model repository of ours meets one.

It reads config.pbtxt by Triton's own protobuf schema, compares models with it as the ONNX Runtime backend does, checks
every request as the server's core does, runs stages by ONNX Runtime from the repository's files, and gives the loop
what the Python backend's stub gives it (triton_python_backend_utils).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format

TYPES = {
    "TYPE_UINT8": np.dtype(np.uint8), "TYPE_INT64": np.dtype(np.int64), "TYPE_UINT64": np.dtype(np.uint64),
    "TYPE_FP32": np.dtype(np.float32), "TYPE_STRING": np.dtype(np.object_),
}  # fmt: skip
ORT_TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64", "tensor(uint8)": "TYPE_UINT8"}
UTILS = "triton_python_backend_utils"


def schema() -> Any:
    """Triton's model_config_pb2, which tritonclient ships; its package cannot be imported without all of gRPC's."""
    if "model_config_pb2" not in sys.modules:
        path = Path(str(distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")))
        spec = importlib.util.spec_from_file_location("model_config_pb2", path)
        assert spec and spec.loader
        sys.modules["model_config_pb2"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["model_config_pb2"])
    return sys.modules["model_config_pb2"]


class Refused(Exception):
    """The server does not take a model or a request."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise Refused(message)


class TritonModelException(Exception):
    pass


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        assert isinstance(message, str)
        assert isinstance(code, int)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    """A tensor; `gpu` where it lies on a device, as no array of the stub's own does."""

    def __init__(self, name: str, array: Any, /) -> None:
        assert name
        assert isinstance(array, np.ndarray)
        assert array.dtype in TYPES.values(), array.dtype
        self._name, self._array, self.gpu, self.gone = name, np.ascontiguousarray(array), False, False
        if array.ndim == 0:
            self._array = array

    @staticmethod
    def from_dlpack(name: str, tensor: Any, /) -> Tensor:
        assert hasattr(tensor, "__dlpack__")
        assert hasattr(tensor, "__dlpack_device__")
        made = Tensor(name, tensor.bytes_of())
        made.gpu = tensor.gpu
        return made

    def __dlpack__(self, stream: Any = None) -> Any:
        raise NotImplementedError

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0) if self.gpu else (1, 0)

    def name(self) -> str:
        return self._name

    def shape(self) -> list[int]:
        return list(self._array.shape)

    def is_cpu(self) -> bool:
        return not self.gpu

    def as_numpy(self) -> Any:
        assert not self.gone, f"{self._name}: read after execute returned"
        if self.gpu:
            raise TritonModelException("Tensor is stored in GPU and cannot be converted to NumPy.")
        return self._array

    def bytes_of(self) -> Any:
        return self._array


class PreferredMemory:
    def __init__(self, preferred_memory_type: str, preferred_device_id: int = 0) -> None:
        assert preferred_memory_type in ("cpu", "gpu")
        self.kind = preferred_memory_type


class InferenceResponse:
    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None, parameters: Any = None
    ) -> None:
        assert all(isinstance(tensor, Tensor) for tensor in output_tensors)
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


def by_name(tensors: Sequence[Tensor], name: str) -> Tensor | None:
    return next((tensor for tensor in tensors if tensor.name() == name), None)


class Request:
    """A request as the loop's `execute` receives it."""

    def __init__(self, inputs: Mapping[str, Any], outputs: Sequence[str], cancelled: bool = False) -> None:
        self._inputs = [Tensor(name, array) for name, array in inputs.items()]
        self._outputs, self.cancelled = sorted(set(outputs)), cancelled

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def is_cancelled(self) -> bool:
        return self.cancelled

    def release(self) -> None:
        for tensor in self._inputs:
            tensor.gone = True


class Model:
    """A folder of the repository with its configuration, checked as `ValidateModelConfig` and the backends do."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.config = schema().ModelConfig()
        text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), self.config)
        config = self.config
        check(config.name == folder.name, f"{folder.name}: its config is of {config.name!r}")
        versions = [path for path in folder.iterdir() if path.is_dir()]
        check([path.name for path in versions] == ["1"], f"{folder.name}: versions {versions}")
        self.version = versions[0]
        for io in (*config.input, *config.output):
            check(bool(io.name) and io.data_type != 0 and len(io.dims) > 0, f"{folder.name}: {io.name} is incomplete")
            check(all(dim >= 1 or dim == -1 for dim in io.dims), f"{folder.name}: dims of {io.name}")
        check(all(size.count >= 1 for size in config.instance_group), f"{folder.name}: instances")
        pairs = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan", "python": ""}
        check(pairs[config.backend] == config.platform, f"{folder.name}: {config.platform} on {config.backend}")
        check(not config.HasField("dynamic_batching") or config.max_batch_size > 0, f"{folder.name}: no batches")
        self.gpu = any(
            schema().ModelInstanceGroup.Kind.Name(group.kind) == "KIND_GPU" for group in config.instance_group
        )
        self.session: Any = None
        if config.backend == "onnxruntime":
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = threads
            self.session = onnxruntime.InferenceSession(
                str(self.version / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
            self._compare()

    def _compare(self) -> None:
        """`ValidateInputs` and `ValidateOutputs` of the ONNX Runtime backend."""
        for ios, real, exact in (
            (self.config.input, self.session.get_inputs(), False),
            (self.config.output, self.session.get_outputs(), True),
        ):
            check(len(ios) == len(real), f"{self.folder.name}: {len(ios)} tensors, the model has {len(real)}")
            for io in ios:
                (tensor,) = [one for one in real if one.name == io.name] or [None]
                check(tensor is not None, f"{self.folder.name}: no {io.name} in the model")
                check(type_of(io) == ORT_TYPES[tensor.type], f"{self.folder.name}: {io.name} is {tensor.type}")
                shape = [dim if isinstance(dim, int) else -1 for dim in tensor.shape]
                fits = len(shape) == len(io.dims) and all(
                    dim == wanted for dim, wanted in zip(shape, io.dims, strict=True) if exact or dim != -1
                )
                check(fits, f"{self.folder.name}: {io.name} is {shape} in the model, {list(io.dims)} in its config")

    def check_request(self, tensors: Mapping[str, Any], outputs: Sequence[str]) -> int:
        """`InferenceRequest::Normalize` of the server's core; returns the batch size (0: not batched)."""
        config, name = self.config, self.folder.name
        known = {io.name: io for io in config.input}
        check(set(tensors) <= set(known), f"{name}: unknown input among {sorted(tensors)}")
        needed = {io.name for io in config.input if not io.optional}
        check(needed <= set(tensors), f"{name}: expected inputs {sorted(needed)}, got {sorted(tensors)}")
        check(set(outputs) <= {io.name for io in config.output}, f"{name}: unexpected output among {outputs}")
        batches = set()
        for key, array in tensors.items():
            io, shape = known[key], list(array.shape)
            check(array.dtype == TYPES[type_of(io)], f"{name}: {key} is {array.dtype}, not {type_of(io)}")
            if config.max_batch_size > 0:
                check(len(shape) > 0, f"{name}: {key} has no batch dimension")
                batches.add(shape.pop(0))
            fits = len(shape) == len(io.dims) and all(
                wanted in (-1, dim) for dim, wanted in zip(shape, io.dims, strict=True)
            )
            check(fits, f"{name}: {key} is {array.shape}, expected {list(io.dims)}")
        check(len(batches) <= 1, f"{name}: batch sizes differ")
        batch = batches.pop() if batches else 0
        check(batch <= config.max_batch_size, f"{name}: batch-size must be <= {config.max_batch_size}")
        return int(batch)


def type_of(io: Any) -> str:
    return str(schema().DataType.Name(io.data_type))


class Server:
    """Serves a repository's models. calls: what the loop asked for: a stage's model, and its inputs' shapes. fail: what
    models answer in place of working. log: what the loop said. moved: bytes between host and GPU."""

    def __init__(self, repository: Path, threads: int = 1) -> None:
        self.models = {path.name: Model(path, threads) for path in sorted(repository.iterdir())}
        self.calls: list[tuple[str, dict[str, tuple[int, ...]]]] = []
        self.log: list[str] = []
        self.fail: dict[str, str] = {}
        self.moved = 0
        self._executing = False
        self.loops: dict[str, Any] = {}

    @contextmanager
    def running(self, name: str) -> Iterator[Any]:
        """The loop of this name, initialised; `infer` asks it."""
        loop = self.models[name]
        check(loop.config.backend == "python", f"{name}: no Python model")
        before = {key: sys.modules.get(key) for key in (UTILS, "far_runtime.triton.model")}
        sys.modules[UTILS] = self.utils()
        sys.modules.pop("far_runtime.triton.model", None)
        sys.path.append(str(loop.version))
        try:
            spec = importlib.util.spec_from_file_location("model", loop.version / "model.py")
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            made = module.TritonPythonModel()
            config = json_format.MessageToDict(
                loop.config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
            made.initialize({
                "model_config": json.dumps(config), "model_instance_kind": "CPU", "model_instance_device_id": "0",
                "model_repository": str(loop.folder), "model_version": "1", "model_name": name,
            })  # fmt: skip
            self.loops[name] = made
            yield made
            made.finalize()
        finally:
            sys.path.remove(str(loop.version))
            for key, value in before.items():
                sys.modules.pop(key, None)
                if value is not None:
                    sys.modules[key] = value

    def infer(self, name: str, *requests: Mapping[str, Any], outputs: Sequence[str] = ()) -> list[Any]:
        """What the loop answers to requests that its batcher puts together: arrays by name, or the error."""
        wanted = list(outputs) or [io.name for io in self.models[name].config.output]
        return self.infer_requests(name, [Request(inputs, wanted) for inputs in requests])

    def infer_requests(self, name: str, requests: Sequence[Request]) -> list[Any]:
        model = self.models[name]
        sizes = []
        for request in requests:
            tensors = {tensor.name(): tensor.bytes_of() for tensor in request.inputs()}
            sizes.append(model.check_request(tensors, request.requested_output_names()))
        check(sum(sizes) <= model.config.max_batch_size, f"{name}: a batch of {sum(sizes)}")
        check(len({tuple(sorted(one.name() for one in r.inputs())) for r in requests}) == 1, "optional inputs differ")
        self._executing = True
        responses = self.loops[name].execute(requests)
        self._executing = False
        for request in requests:
            request.release()
        check(len(responses) == len(requests), f"{name}: {len(responses)} responses for {len(requests)} requests")
        return [
            self._answer(model, request, size, one)
            for request, size, one in zip(requests, sizes, responses, strict=True)
        ]

    def _answer(self, model: Model, request: Request, size: int, response: InferenceResponse) -> Any:
        assert isinstance(response, InferenceResponse)
        if response.has_error():
            return response.error()
        arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        check(sorted(arrays) == request.requested_output_names(), f"{model.folder.name}: gave {sorted(arrays)}")
        for io in model.config.output:
            if io.name in arrays:
                array = arrays[io.name]
                check(array.shape == (size, *io.dims), f"{model.folder.name}: {io.name} is {array.shape}")
                check(array.dtype == TYPES[type_of(io)], f"{model.folder.name}: {io.name} is {array.dtype}")
        return arrays

    def execute(self, request: Any) -> InferenceResponse:
        """A request from within the loop."""
        assert self._executing, "business logic scripting works in execute alone"
        try:
            check(request.model_name in self.models, f"Model '{request.model_name}' is not ready.")
            model = self.models[request.model_name]
            check(request.model_name not in self.fail, self.fail.get(request.model_name, ""))
            feed = {tensor.name(): tensor.bytes_of() for tensor in request.tensors}
            model.check_request(feed, request.outputs)
            self.calls.append((request.model_name, {name: array.shape for name, array in feed.items()}))
            arrays = model.session.run(request.outputs, feed)
        except Refused as error:
            return InferenceResponse(error=TritonError(str(error)))
        tensors = [Tensor(name, array) for name, array in zip(request.outputs, arrays, strict=True)]
        for tensor in tensors:
            tensor.gpu = model.gpu and (request.memory is None or request.memory.kind == "gpu")
            # The backend reads the memory of such a tensor, and there is none.
            assert not tensor.gpu or tensor.bytes_of().size, (
                f"{request.model_name}: {tensor.name()} of no bytes on a GPU"
            )
        self.moved += sum(tensor.bytes_of().nbytes for tensor in tensors if model.gpu and not tensor.gpu)
        self.moved += sum(tensor.bytes_of().nbytes for tensor in request.tensors if model.gpu and not tensor.gpu)
        return InferenceResponse(tensors)

    def utils(self) -> types.ModuleType:
        """The module triton_python_backend_utils, as the stub completes it."""
        server = self

        class InferenceRequest:
            def __init__(
                self, *, inputs: Sequence[Tensor], requested_output_names: Sequence[str], model_name: str,
                request_id: str = "", correlation_id: int | str = 0, model_version: int = -1, flags: int = 0,
                timeout: int = 0, preferred_memory: PreferredMemory | None = None, trace: Any = None,
                parameters: Mapping[str, Any] | None = None,
            ) -> None:  # fmt: skip
                assert all(isinstance(tensor, Tensor) for tensor in inputs)
                self.tensors, self.outputs = list(inputs), sorted(set(requested_output_names))
                self.model_name, self.memory = model_name, preferred_memory

            def exec(self, decoupled: bool = False) -> InferenceResponse:
                assert not decoupled
                return server.execute(self)

        class Logger:
            @staticmethod
            def log_error(message: str) -> None:
                server.log.append(message)

        module: Any = types.ModuleType(UTILS)
        module.Tensor, module.TritonError, module.TritonModelException = Tensor, TritonError, TritonModelException
        module.InferenceRequest, module.InferenceResponse = InferenceRequest, InferenceResponse
        module.PreferredMemory, module.Logger = PreferredMemory, Logger
        module.TRITONSERVER_MEMORY_CPU, module.TRITONSERVER_MEMORY_GPU = "cpu", "gpu"
        module.get_input_tensor_by_name = lambda request, name: by_name(request.inputs(), name)
        module.get_output_tensor_by_name = lambda response, name: by_name(response.output_tensors(), name)
        result: types.ModuleType = module
        return result


def strings(*values: str) -> Any:
    """A TYPE_STRING tensor [B, 1]."""
    return np.array([[value.encode()] for value in values], np.object_)


def seeds(*values: int) -> Any:
    """A TYPE_UINT64 tensor [B, 1]."""
    return np.array([[value] for value in values], np.uint64)
