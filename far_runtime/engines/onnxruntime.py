"""ONNX Runtime engine: one session per graph, created at its first use; arrays stay on the device by I/O binding."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import Bundle, Graph
from far_runtime.engines.base import Array, EngineOptions, scalar
from far_runtime.engines.onnxruntime_providers import PROVIDERS, check_session, parse_providers, provider_options
from far_runtime.errors import FarError, SettingName


class OnnxRuntimeEngine:
    """Runs a bundle's graphs on one of ONNX Runtime's providers (`PROVIDERS`), or on several: "tensorrt,cuda".

    A node that the named providers cannot compute is an error; it never falls back to the CPU silently. Of the
    providers, we have run the CPU's only. Raises FarError where onnxruntime is not installed or lacks the provider.
    """

    def __init__(self, bundle: Bundle, provider: str = "cpu", options: EngineOptions | None = None) -> None:
        try:
            self._ort: Any = importlib.import_module("onnxruntime")
        except ImportError:
            raise FarError(
                "onnxruntime is not installed; install it with: pip install 'far-deploy[cpu]' (or [gpu] for CUDA "
                "and TensorRT)"
            ) from None
        self._names = parse_providers(provider)
        for name in self._names:
            if PROVIDERS[name].name not in self._ort.get_available_providers():
                raise FarError(
                    f"engine onnxruntime:{provider}: this onnxruntime has no {PROVIDERS[name].name}; install it with: ",
                    PROVIDERS[name].package,
                )
        self.name = f"onnxruntime:{provider}"
        self.version: str = self._ort.__version__
        self._bundle = bundle
        self._device = PROVIDERS[self._names[0]].device
        self._options = options or EngineOptions()
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
            if self._options.low_memory:
                self._sessions.clear()
            self._sessions[graph.name] = self._open(graph)
        return self._sessions[graph.name]

    def _open(self, graph: Graph) -> Any:
        path: Path = self._bundle.path / graph.file
        providers = [(PROVIDERS[name].name, provider_options(name, graph)) for name in self._names]
        try:
            # With its "fallback", a provider that does not start would be replaced by another one.
            session = self._ort.InferenceSession(
                str(path), self._session_options(graph), providers=providers, enable_fallback=0
            )
        except Exception as error:  # onnxruntime raises many types; all mean that it does not take this file
            detail = str(error).splitlines()[0]
            if graph.precision == "bf16" and list(self._names) == ["cpu"]:
                raise FarError(
                    f"{path}: is in BF16, for which onnxruntime has no kernels on the CPU; use ",
                    SettingName("engine"),
                    " openvino, or export the bundle with --precision fp16 or fp32",
                ) from error
            raise FarError(
                f"{path}: onnxruntime {self.version} does not load it on {self.name} ({detail}); use another ",
                SettingName("engine"),
                ", or export the bundle again",
            ) from error
        check_session(session, self._names, self.name, path)
        return session

    def _session_options(self, graph: Graph) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = self._options.arena and not self._options.low_memory
        if self._options.threads:
            options.intra_op_num_threads = self._options.threads
        if graph.constants:
            # One of several graphs over the same weights: a packed copy in each would multiply the memory, unpacked
            # they all read the one mapped file.
            options.add_session_config_entry("session.disable_prepacking", "1")
        # Without VNNI sums of INT8 products overflow; it has slower kernels there that do not.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if "cpu" not in self._names:
            if hasattr(self._ort.InferenceSession, "get_provider_graph_assignment_info"):
                options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            else:
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return options
