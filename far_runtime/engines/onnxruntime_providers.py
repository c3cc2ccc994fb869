"""ONNX Runtime's providers: names, where their arrays live, options, and which nodes they left to others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_runtime.bundle import Graph
from far_runtime.errors import FarError, Message, SettingName

SHAPE_ARITHMETIC = frozenset(
    (
        "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity", "Max",
        "Min", "Mul", "Range", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
    )
)  # fmt: skip
"""Operators that compute shapes: a GPU's provider leaves them to the CPU on purpose."""


@dataclass(frozen=True)
class Provider:
    """One of ONNX Runtime's execution providers."""

    name: str
    """Its name in ONNX Runtime."""
    device: str
    """The device of its arrays, as OrtValue takes it."""
    package: str
    """How to install it."""
    options: Mapping[str, str]
    """Provider options for every graph."""
    profile: str = ""
    """Prefix of the three options for smallest, usual and largest shapes; empty where it has no such options."""


PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", "cpu", "pip install 'far-deploy[cpu]'", {}),
    "cuda": Provider(
        "CUDAExecutionProvider",
        "cuda",
        "pip uninstall onnxruntime && pip install 'far-deploy[gpu]'",
        # FP32 is computed in FP32, not TF32; convolutions are not searched anew for every batch size; memory grows by
        # what is asked for, not to the next power of two.
        {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"},
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "cuda",
        "pip uninstall onnxruntime && pip install 'far-deploy[gpu]', and TensorRT",
        {},  # of the precisions only those that are in the graph
        "trt_profile",
    ),
    "tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "cuda",
        "an onnxruntime that was built with TensorRT-RTX (onnxruntime-trt-rtx or your own)",
        {},
        "nv_profile",
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        "cpu",
        Message(
            "pip uninstall onnxruntime && pip install onnxruntime-openvino (or use ",
            SettingName("engine"),
            " openvino)",
        ),
        {"device_type": "CPU", "precision": "FP32"},
    ),
}


def parse_providers(text: str) -> list[str]:
    """The names of the providers in an engine's name, the preferred one first.

    "tensorrt,cuda": CUDA computes what TensorRT cannot. FarError for an unknown provider or one that is named twice.
    """
    names = text.split(",")
    for name in names:
        if name not in PROVIDERS:
            raise FarError(f"engine onnxruntime:{text}: unknown provider; known: {', '.join(PROVIDERS)}")
    if len(set(names)) < len(names):
        raise FarError(f"engine onnxruntime:{text}: a provider is named twice; name each once")
    return names


def provider_options(provider: str, graph: Graph) -> dict[str, str]:
    """Options of a provider for one graph."""
    prefix, options = PROVIDERS[provider].profile, dict(PROVIDERS[provider].options)
    if prefix and graph.profile:
        for i, bound in enumerate(("min", "opt", "max")):
            options[f"{prefix}_{bound}_shapes"] = ",".join(
                f"{spec.name}:{'x'.join(str(graph.profile[d][i] if isinstance(d, str) else d) for d in spec.shape)}"
                for spec in graph.inputs
            )
    return options


def check_session(session: Any, names: Sequence[str], engine: str, path: Path) -> None:
    """FarError unless a session uses the first of the named providers, and the named ones compute the whole graph.

    Where "cpu" is not among the names, the CPU may compute shapes only.
    """
    expected = [PROVIDERS[name].name for name in names]
    if session.get_providers()[:1] != expected[:1]:
        raise FarError(
            f"{engine}: {expected[0]} did not start for {path} (its libraries, or the device, cannot be used); see the "
            "messages of onnxruntime above, or use ",
            SettingName("engine"),
            " onnxruntime",
        )
    if "cpu" in names or not hasattr(session, "get_provider_graph_assignment_info"):
        # Without that method it is an earlier onnxruntime, which was told to refuse a graph that needs the CPU.
        return
    left: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name not in expected:
            left.update(node.op_type for node in part.get_nodes() if node.op_type not in SHAPE_ARITHMETIC)
    if left:
        raise FarError(
            f"{engine}: {expected[0]} leaves {sum(left.values())} nodes of {path} to another provider "
            f"({', '.join(f'{count} {operator}' for operator, count in left.most_common(4))}); allow it with ",
            SettingName("engine"),
            f" {engine},cpu, or use another engine",
        )
