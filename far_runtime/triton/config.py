"""config.pbtxt, Triton's configuration of a model: inference.ModelConfig in protobuf's text format (model_config.proto
in Triton's common repository)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from far_runtime.bundle import Graph, Manifest, TensorSpec
from far_runtime.conditioning.subjects import takes_text
from far_runtime.engines.onnxruntime_providers import provider_options
from far_runtime.errors import FarError

DTYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "uint8": "TYPE_UINT8"}
"""Triton's names for the dtypes of stage inputs and outputs."""

VERSION = 1
"""The version of every model, which is the name of the folder with its files."""


class Enum(str):
    """The value of a protobuf enumeration, which is written without quotes."""


@dataclass(frozen=True)
class Backend:
    """A backend of Triton's that runs the stages."""

    name: str
    """Our name of the engine, as `--engine` takes it."""

    library: str
    """Triton's name of the backend."""

    kind: str
    """KIND_CPU or KIND_GPU: where its instances run."""

    accelerator: str = ""
    """The execution provider that ONNX Runtime uses beside its default one, by our name; "" for none."""

    @property
    def platform(self) -> str:
        """Triton's name for the format of the model file."""
        return "tensorrt_plan" if self.library == "tensorrt" else "onnxruntime_onnx"

    @property
    def file(self) -> str:
        """The name of the model file."""
        return "model.plan" if self.library == "tensorrt" else "model.onnx"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("onnxruntime", "onnxruntime", "KIND_CPU"),
        Backend("onnxruntime:openvino", "onnxruntime", "KIND_CPU", "openvino"),
        Backend("onnxruntime:cuda", "onnxruntime", "KIND_GPU", "cuda"),
        Backend("onnxruntime:tensorrt", "onnxruntime", "KIND_GPU", "tensorrt"),
        Backend("tensorrt", "tensorrt", "KIND_GPU"),
    )
}


def get_backend(engine: str) -> Backend:
    """The backend of an engine's name; raises FarError for an engine that Triton does not have."""
    engine = "onnxruntime" if engine == "onnxruntime:cpu" else engine
    if engine not in BACKENDS:
        raise FarError(f"engine {engine!r}: Triton runs {', '.join(BACKENDS)}; use one of these")
    return BACKENDS[engine]


@dataclass(frozen=True)
class ServingConfig:
    """How Triton runs the models of a repository."""

    gpus: tuple[int, ...] = ()
    """Device numbers; empty for all GPUs."""

    instances: int = 1
    """Instances of each stage, on each GPU."""

    threads: int | None = None
    """Threads of an instance on the CPU; None for ONNX Runtime's default."""

    loops: int = 1
    """Processes that run the sampling loop, each of which draws one batch at a time."""

    max_batch: int = 8
    """Pictures of a batch."""

    max_wait_ms: float = 10.0
    """How long a request waits for others to fill its batch, in milliseconds."""

    max_queue: int = 64
    """Requests that may wait."""

    tensors: str = "host"
    """Where tensors are kept between stages on a GPU: "host" or "device"."""

    environment: str = ""
    """The Python environment of the loop (Triton's EXECUTION_ENV_PATH); "" for the server's own."""


def stage_model(prefix: str, graph: Graph) -> str:
    """The name of the model of a graph."""
    return f"{prefix}_{graph.name}"


def stage_config(
    name: str, graph: Graph, backend: Backend, serving: ServingConfig, profiles: int = 1
) -> dict[str, Any]:
    """The configuration of a stage's model; profiles: how many optimization profiles its TensorRT engine has.

    Triton does not batch stages (max_batch_size 0, dims with the batch axis): with guidance some tensors have twice as
    many rows as pictures, and numbers of shape [1] have no batch axis. The loop makes the batches.
    """
    group: dict[str, Any] = {"count": serving.instances, "kind": Enum(backend.kind)}
    if serving.gpus and backend.kind == "KIND_GPU":
        group["gpus"] = list(serving.gpus)
    if backend.library == "tensorrt" and profiles > 1:
        group["profile"] = [str(i) for i in range(profiles)]
    config: dict[str, Any] = {
        "name": name,
        "platform": backend.platform,
        "backend": backend.library,
        "max_batch_size": 0,
        "input": [_tensor(spec) for spec in graph.inputs],
        "output": [_tensor(spec) for spec in graph.outputs],
        "instance_group": [group],
    }
    if backend.accelerator:
        config["optimization"] = {"execution_accelerators": _accelerators(backend, graph)}
    if backend.library == "onnxruntime" and serving.threads is not None and backend.kind == "KIND_CPU":
        config["parameters"] = _parameters({"intra_op_thread_count": str(serving.threads)})
    return config


def loop_config(name: str, manifest: Manifest, backend: Backend, serving: ServingConfig) -> dict[str, Any]:
    """The configuration of the loop's model, which Triton batches: one picture per row."""
    side = manifest.model.image_size
    reads_text = takes_text(manifest)
    optional_inputs = [("SEED", "TYPE_UINT64"), ("SAMPLING", "TYPE_STRING")]
    if reads_text:
        optional_inputs.append(("NEGATIVE", "TYPE_STRING"))
    parameters = {"STAGES": name, "ENGINE": backend.name, "TENSORS": serving.tensors}
    if serving.environment:
        parameters["EXECUTION_ENV_PATH"] = serving.environment
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": serving.max_batch,
        "input": [
            {"name": "PROMPT" if reads_text else "LABEL", "data_type": Enum("TYPE_STRING"), "dims": [1]},
            *(
                {"name": input_name, "data_type": Enum(dtype), "dims": [1], "optional": True}
                for input_name, dtype in optional_inputs
            ),
        ],
        "output": [
            {"name": "PIXELS", "data_type": Enum("TYPE_UINT8"), "dims": [side, side, 3]},
            {"name": "SETTINGS", "data_type": Enum("TYPE_STRING"), "dims": [1]},
        ],
        "instance_group": [{"count": serving.loops, "kind": Enum("KIND_CPU")}],
        "dynamic_batching": {
            "max_queue_delay_microseconds": round(serving.max_wait_ms * 1000),
            "default_queue_policy": {"max_queue_size": serving.max_queue},
        },
        "parameters": _parameters(parameters),
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    dims = [-1 if isinstance(axis, str) else axis for axis in spec.shape]
    return {"name": spec.name, "data_type": Enum(DTYPES[spec.dtype]), "dims": dims}


def _accelerators(backend: Backend, graph: Graph) -> dict[str, Any]:
    """The execution providers, with the options that `far generate` gives them.

    Beside TensorRT's stands CUDA's, for the nodes that TensorRT does not take.
    """
    names = [backend.accelerator, *(["cuda"] if backend.accelerator == "tensorrt" else [])]
    accelerators = []
    for name in names:
        options = {} if name == "openvino" else provider_options(name, graph)
        parameters = [{"key": key, "value": value} for key, value in options.items() if value]
        accelerators.append({"name": name, **({"parameters": parameters} if parameters else {})})
    device = "gpu" if backend.kind == "KIND_GPU" else "cpu"
    return {f"{device}_execution_accelerator": accelerators}


def _parameters(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def to_text(message: Mapping[str, Any]) -> str:
    """A message in protobuf's text format, from mappings for messages and sequences for repeated fields."""
    return "\n".join(_lines(message)) + "\n"


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(name, value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and isinstance(value[0], Mapping):
                for item in value:
                    yield from _block(name, item)
            else:
                yield f"{name}: [{', '.join(map(_scalar, value))}]"
        else:
            yield f"{name}: {_scalar(value)}"


def _block(name: str, message: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name} {{"
    yield from (f"  {line}" for line in _lines(message))
    yield "}"


def _scalar(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False)
