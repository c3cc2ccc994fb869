"""ONNX Runtime engine: one session per graph, made when first used, arrays bound where they lie."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import Bundle, Graph
from far_runtime.engines.base import Array, EngineOptions, scalar
from far_runtime.errors import FarError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class OnnxRuntimeEngine:
    """Runs a bundle's graphs on ONNX Runtime's CPU, CUDA or TensorRT provider.

    The CUDA and TensorRT providers have not been run on a GPU by us. Raises FarError where onnxruntime is not
    installed or lacks the provider.
    """

    def __init__(self, bundle: Bundle, provider: str = "cpu", options: EngineOptions | None = None) -> None:
        try:
            self._ort: Any = importlib.import_module("onnxruntime")
        except ImportError:
            raise FarError(
                "onnxruntime is not installed; install it with: pip install 'far-deploy[cpu]' (or [gpu] for CUDA "
                "and TensorRT)"
            ) from None
        if provider not in PROVIDERS:
            raise FarError(f"engine onnxruntime:{provider}: unknown provider; known: {', '.join(PROVIDERS)}")
        if PROVIDERS[provider] not in self._ort.get_available_providers():
            raise FarError(
                f"engine onnxruntime:{provider}: this onnxruntime has no {PROVIDERS[provider]}; "
                "install it with: pip uninstall onnxruntime && pip install 'far-deploy[gpu]'"
            )
        self.name = f"onnxruntime:{provider}"
        self.version: str = self._ort.__version__
        self._bundle = bundle
        self._device = "cpu" if provider == "cpu" else "cuda"
        self._providers = [PROVIDERS[name] for name in _fallbacks(provider)]
        self._threads = (options or EngineOptions()).threads
        self._sessions: dict[str, Any] = {}

    def put(self, array: NDArray[Any]) -> Array:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)

    def get(self, array: Array) -> NDArray[Any]:
        host: NDArray[Any] = array.numpy()
        return host

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        constants = constants or {}
        graph = self._bundle.manifest.graph(stage, constants)
        session = self._session(graph)
        binding = session.io_binding()
        for spec in graph.inputs:
            value = inputs[spec.name] if spec.name in inputs else self.put(scalar(constants[spec.name], np.int64))
            binding.bind_ortvalue_input(spec.name, value)
        for output in graph.outputs:
            binding.bind_output(output.name, self._device, 0)
        session.run_with_iobinding(binding)
        return dict(zip((output.name for output in graph.outputs), binding.get_outputs(), strict=True))

    def close(self) -> None:
        self._sessions.clear()

    def _session(self, graph: Graph) -> Any:
        if graph.name not in self._sessions:
            options = self._ort.SessionOptions()
            options.log_severity_level = 3
            if self._threads:
                options.intra_op_num_threads = self._threads
            if graph.constants:
                # One of several graphs over the same weights: a packed copy in each would multiply the memory, unpacked
                # they all read the one mapped file.
                options.add_session_config_entry("session.disable_prepacking", "1")
            path = self._bundle.path / graph.file
            try:
                self._sessions[graph.name] = self._ort.InferenceSession(str(path), options, providers=self._providers)
            except Exception as error:  # onnxruntime raises many types; all mean that it does not take this file
                detail = str(error).splitlines()[0]
                raise FarError(
                    f"{path}: onnxruntime {self.version} does not load it ({detail}); export the bundle again"
                ) from error
        return self._sessions[graph.name]


def _fallbacks(provider: str) -> list[str]:
    """The provider and those behind it, best first: what one cannot run, the next does."""
    order = ["tensorrt", "cuda", "cpu"]
    return order[order.index(provider) :]
