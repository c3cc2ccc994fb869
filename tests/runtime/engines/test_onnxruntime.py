"""ONNX Runtime's providers by name: what they are given, and that none is replaced in silence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from far_runtime.bundle import Bundle, open_bundle
from far_runtime.engines import open_engine
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.onnxruntime_providers import (
    PROVIDERS,
    Provider,
    check_session,
    parse_providers,
    provider_options,
)
from far_runtime.errors import FarError

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed on this machine")

ONE = EngineOptions(threads=1)


@pytest.fixture
def bundle(tiny: Any) -> Bundle:
    return open_bundle(tiny.bundle)


def decode(bundle: Bundle, name: str, options: EngineOptions = ONE) -> np.ndarray[Any, Any]:
    engine = open_engine(bundle, name, options)
    latents = np.random.default_rng(0).normal(size=(2, 16, 4)).astype(np.float32)
    pixels: np.ndarray[Any, Any] = engine.get(engine.run("decode", {"latents": engine.put(latents)})["pixels"])
    return pixels


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name "cuda" a real provider that takes no ordinary node, so that all of them are left to the CPU."""
    if "AzureExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no provider that leaves all to the CPU")
    monkeypatch.setitem(PROVIDERS, "cuda", Provider("AzureExecutionProvider", "cpu", "", {}))


def test_nodes_left_to_the_cpu_are_an_error(idle: None, bundle: Bundle) -> None:
    with pytest.raises(FarError, match=r"leaves \d+ nodes of .*decode\.onnx to another provider \(\d+ .*:cuda,cpu, or"):
        decode(bundle, "onnxruntime:cuda")


def test_an_earlier_onnxruntime_is_told_to_refuse_them(
    idle: None, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ort.capi.onnxruntime_inference_collection.Session, "get_provider_graph_assignment_info")
    with pytest.raises(FarError, match="fallback to CPU EP has been explicitly disabled"):
        decode(bundle, "onnxruntime:cuda")


def test_the_cpu_helps_where_it_is_named(idle: None, bundle: Bundle) -> None:
    assert np.array_equal(decode(bundle, "onnxruntime:cuda,cpu"), decode(bundle, "onnxruntime"))


def test_a_provider_that_did_not_start_is_an_error() -> None:
    """As it is where CUDA's libraries are missing: onnxruntime goes on without the provider."""
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    for names in (["cuda"], ["cuda", "cpu"]):
        with pytest.raises(FarError, match="CUDAExecutionProvider did not start"):
            check_session(session, names, "onnxruntime:cuda", Path("decode.onnx"))


def test_arithmetic_of_shapes_may_be_on_the_cpu() -> None:
    def session(*operators: str) -> Any:
        nodes = [SimpleNamespace(op_type=operator) for operator in operators]
        part = SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)
        return SimpleNamespace(
            get_providers=lambda: ["CUDAExecutionProvider"], get_provider_graph_assignment_info=lambda: [part]
        )

    check_session(session("Shape", "Gather", "Concat"), ["cuda"], "onnxruntime:cuda", Path("a.onnx"))
    with pytest.raises(FarError, match=r"leaves 3 nodes of a\.onnx to another provider \(2 MatMul, 1 Softmax\)"):
        check_session(session("Shape", "MatMul", "Softmax", "MatMul"), ["cuda"], "onnxruntime:cuda", Path("a.onnx"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rocm", "unknown provider; known: cpu, cuda, tensorrt, tensorrt-rtx, openvino"),
        ("cpu,cpu", "named twice"),
        ("cpu,", "unknown provider"),
    ],
)
def test_names_that_cannot_be(name: str, said: str) -> None:
    with pytest.raises(FarError, match=said):
        parse_providers(name)


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "cpu"])
def test_a_provider_that_is_not_there_is_said_with_what_brings_it(bundle: Bundle, name: str) -> None:
    if PROVIDERS[name].name in ort.get_available_providers():
        pytest.skip("it is there")
    with pytest.raises(FarError, match=rf"this onnxruntime has no {PROVIDERS[name].name}; install it with"):
        open_engine(bundle, f"onnxruntime:{name}")


def test_tensorrt_gets_the_shapes_of_the_profile(bundle: Bundle) -> None:
    graph = next(graph for graph in bundle.manifest.graphs if graph.name == "denoise")
    low, usual, high = graph.profile["rows"]
    for provider, prefix in (("tensorrt", "trt_profile"), ("tensorrt-rtx", "nv_profile")):
        options = provider_options(provider, graph)
        for kind, rows in (("min", low), ("opt", usual), ("max", high)):
            shapes = dict(text.split(":") for text in options[f"{prefix}_{kind}_shapes"].split(","))
            assert list(shapes) == [spec.name for spec in graph.inputs]
            assert shapes["condition"] == f"{rows}x16x32" and shapes["timestep"] == "1"


def test_fp32_on_cuda_is_not_tf32(bundle: Bundle) -> None:
    assert provider_options("cuda", bundle.manifest.graphs[0])["use_tf32"] == "0"


def test_the_same_pixels_without_an_arena(bundle: Bundle) -> None:
    assert np.array_equal(decode(bundle, "onnxruntime"), decode(bundle, "onnxruntime", EngineOptions(1, arena=False)))
