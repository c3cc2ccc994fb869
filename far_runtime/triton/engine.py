"""The engine inside Triton: runs stages as models of the same server, by business logic scripting.

It has not run under Triton itself: in tests/simulator, a simulator stands in for the server and its Python backend.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import Bundle
from far_runtime.engines.base import Array, scalar
from far_runtime.errors import FarError
from far_runtime.triton.config import stage_model

HOST_STAGES = ("decode", "denoise", "place", "quantize")
"""Stages whose outputs the loop reads on the host, if it keeps nothing between batches (see `ConditionCache`)."""


class StageFailed(FarError):
    """The server failed to run a stage."""


class TritonEngine:
    """Runs a bundle's graphs through the server's models, with one blocking request for each call of a stage.

    Triton allows such requests within `execute` alone.

    bundle: its manifest names the graphs.
    utils: the module triton_python_backend_utils, which exists within the server alone.
    prefix: what the names of the stages' models begin with.
    name: of this engine.
    on_device: whether the outputs of stages other than HOST_STAGES stay on the GPU, as Triton's tensors that cannot be
        read. By default Triton copies all outputs to host memory.
    """

    def __init__(self, bundle: Bundle, utils: Any, prefix: str, name: str, on_device: bool = False) -> None:
        self.name = name
        self.version = os.environ.get("TRITON_SERVER_VERSION", "")
        self._bundle, self._utils, self._prefix, self._on_device = bundle, utils, prefix, on_device

    def put(self, array: NDArray[Any]) -> Array:
        return np.array(array, order="C")  # a copy, since a request reads it later

    def get(self, array: Array) -> NDArray[Any]:
        if not isinstance(array, np.ndarray):
            raise StageFailed(f"{array.name()}: is on a GPU and cannot be read")
        return array

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        constants, utils = constants or {}, self._utils
        graph = self._bundle.manifest.graph(stage, constants)
        arrays = {
            spec.name: inputs[spec.name] if spec.name in inputs else scalar(constants[spec.name], np.int64)
            for spec in graph.inputs
        }
        model = stage_model(self._prefix, graph)
        to_host = {"preferred_memory": utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU, 0)}
        request = utils.InferenceRequest(
            model_name=model,
            requested_output_names=[spec.name for spec in graph.outputs],
            inputs=[self._tensor(name, array) for name, array in arrays.items()],
            **({} if self._on_device and stage not in HOST_STAGES else to_host),
        )
        response = request.exec()
        if response.has_error():
            raise StageFailed(f"{model}: {response.error().message()}")
        outputs = {}
        for spec in graph.outputs:
            tensor = utils.get_output_tensor_by_name(response, spec.name)
            if tensor is None:
                raise StageFailed(f"{model}: its response has no {spec.name}")
            outputs[spec.name] = tensor.as_numpy() if tensor.is_cpu() else tensor
        return outputs

    def _tensor(self, name: str, array: Array) -> Any:
        """An array as an input tensor."""
        if isinstance(array, np.ndarray):
            return self._utils.Tensor(name, array)
        return self._utils.Tensor.from_dlpack(name, array)

    def close(self) -> None:
        """Nothing to close: the models belong to the server."""
