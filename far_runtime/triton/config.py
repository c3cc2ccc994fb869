"""config.pbtxt: what Triton is told of a model, in protobuf's text format (inference.ModelConfig of triton's common
repository, model_config.proto)."""

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
"""Of every model in a repository: the name of the folder with its files."""


class Word(str):
    """The value of an enumeration, which stands without quotes."""


@dataclass(frozen=True)
class Backend:
    """What computes the stages.

    name: as `--engine` has it. library: Triton's backend. kind: where its instances are. accelerator: the execution
    provider that ONNX Runtime uses beside its own for that kind, by our name; none: "".
    """

    name: str
    library: str
    kind: str
    accelerator: str = ""

    @property
    def platform(self) -> str:
        """Triton's word for the kind of model file."""
        return "tensorrt_plan" if self.library == "tensorrt" else "onnxruntime_onnx"

    @property
    def file(self) -> str:
        """The model's file in its version folder."""
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


def backend_of(name: str) -> Backend:
    """The backend of an engine's name; FarError for one that Triton does not have."""
    name = "onnxruntime" if name == "onnxruntime:cpu" else name
    if name not in BACKENDS:
        raise FarError(f"engine {name!r}: Triton runs {', '.join(BACKENDS)}; take one of these")
    return BACKENDS[name]


@dataclass(frozen=True)
class Serving:
    """How a repository's models are run.

    gpus: device numbers; none: an instance on every GPU. instances: of each stage (on each GPU). threads: of an
    instance on the CPU; None: ONNX Runtime's choice. loops: processes of the loop, each draws one batch at a time.
    largest: pictures of a batch. wait: milliseconds for which a request waits for company. queue: requests that may
    wait. tensors: where they are between stages on a GPU, "host" or "device". environment: the loop's Python
    environment, as EXECUTION_ENV_PATH takes it; "": the server's own.
    """

    gpus: tuple[int, ...] = ()
    instances: int = 1
    threads: int | None = None
    loops: int = 1
    largest: int = 8
    wait: float = 10.0
    queue: int = 64
    tensors: str = "host"
    environment: str = ""


def stage_model(prefix: str, graph: Graph) -> str:
    """The name of a graph's model."""
    return f"{prefix}_{graph.name}"


def stage_config(name: str, graph: Graph, backend: Backend, serving: Serving, profiles: int = 1) -> dict[str, Any]:
    """The configuration of one graph. profiles: how many optimisation profiles its TensorRT plan has.

    max_batch_size is 0, and the dims are the whole shape: a stage has pictures along one axis and, with guidance, twice
    as many rows along another, and takes numbers of shape [1] beside them, which Triton's own batching cannot put
    together. What is drawn together is put together by the loop.
    """
    group: dict[str, Any] = {"count": serving.instances, "kind": Word(backend.kind)}
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


def loop_config(name: str, manifest: Manifest, backend: Backend, serving: Serving) -> dict[str, Any]:
    """The configuration of the loop: pictures in a batch, requests of several clients together."""
    side = manifest.model["image_size"]
    text = takes_text(manifest)
    shown = "PROMPT" if text else "LABEL"
    inputs: list[dict[str, Any]] = [{"name": shown, "data_type": Word("TYPE_STRING"), "dims": [1]}]
    optional = [("SEED", "TYPE_UINT64"), ("SAMPLING", "TYPE_STRING"), *([("NEGATIVE", "TYPE_STRING")] if text else [])]
    inputs += [{"name": key, "data_type": Word(kind), "dims": [1], "optional": True} for key, kind in optional]
    parameters = {"STAGES": name, "ENGINE": backend.name, "TENSORS": serving.tensors}
    if serving.environment:
        parameters["EXECUTION_ENV_PATH"] = serving.environment
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": serving.largest,
        "input": inputs,
        "output": [
            {"name": "PIXELS", "data_type": Word("TYPE_UINT8"), "dims": [side, side, 3]},
            {"name": "SETTINGS", "data_type": Word("TYPE_STRING"), "dims": [1]},
        ],
        "instance_group": [{"count": serving.loops, "kind": Word("KIND_CPU")}],
        "dynamic_batching": {
            "max_queue_delay_microseconds": round(serving.wait * 1000),
            "default_queue_policy": {"max_queue_size": serving.queue},
        },
        "parameters": _parameters(parameters),
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    dims = [-1 if isinstance(axis, str) else axis for axis in spec.shape]
    return {"name": spec.name, "data_type": Word(DTYPES[spec.dtype]), "dims": dims}


def _accelerators(backend: Backend, graph: Graph) -> dict[str, Any]:
    """The execution providers; CUDA's takes what TensorRT's leaves, with the options that `far generate` gives them."""
    names = [backend.accelerator, *(["cuda"] if backend.accelerator == "tensorrt" else [])]
    where = "gpu_execution_accelerator" if backend.kind == "KIND_GPU" else "cpu_execution_accelerator"
    chosen = []
    for name in names:
        options = {} if name == "openvino" else provider_options(name, graph)
        parameters = [{"key": key, "value": value} for key, value in options.items() if value]
        chosen.append({"name": name, **({"parameters": parameters} if parameters else {})})
    return {where: chosen}


def _parameters(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def text_of(message: Mapping[str, Any]) -> str:
    """A message in protobuf's text format: mappings are messages, sequences repeated fields."""
    return "\n".join(_lines(message)) + "\n"


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(name, value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and isinstance(value[0], Mapping):
                for one in value:
                    yield from _block(name, one)
            else:
                yield f"{name}: [{', '.join(map(_scalar, value))}]"
        else:
            yield f"{name}: {_scalar(value)}"


def _block(name: str, message: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name} {{"
    yield from (f"  {line}" for line in _lines(message))
    yield "}"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False)
