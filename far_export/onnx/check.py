"""Exported graphs are run once, on ONNX Runtime or in BF16 on OpenVINO, and compared with the torch modules that they
came from."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from far_export.compare import compare
from far_export.onnx.tensor_ranges import tensor_ranges
from far_export.stages.stage import Stage
from far_runtime.bundle import Bundle, Graph
from far_runtime.engines import open_engine
from far_runtime.errors import CheckFailed, SettingName

SIZES = {"batch": 2, "rows": 4}
"""Lengths of axes in the check; other ones than in tracing."""


@dataclass(frozen=True)
class GraphCase:
    """One run of a stage's torch module."""

    inputs: dict[str, NDArray[Any]]
    """Inputs by name."""

    outputs: dict[str, NDArray[Any]]
    """Outputs by name."""


def reference_outputs(stages: Sequence[Stage]) -> dict[str, GraphCase]:
    """One run of every stage's torch module by graph name, with other lengths of axes than were traced."""
    cases = {}
    for stage in stages:
        sizes = {axis: SIZES.get(axis, (low + usual) // 2) for axis, (low, usual, _) in stage.profile.items()}
        example = stage.example(sizes, seed=1)
        with torch.inference_mode():
            outputs = stage.module(**example)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        cases[stage.name] = GraphCase(
            {name: tensor.numpy() for name, tensor in example.items()},
            {spec.name: tensor.numpy() for spec, tensor in zip(stage.outputs, outputs, strict=True)},
        )
    return cases


def checking_library(precision: str) -> tuple[str, str]:
    """The engine that runs graphs of a precision on the CPU, which is also the library's name, and the extra of
    far-deploy that installs it."""
    # ONNX Runtime has no BF16 kernels for the CPU.
    return ("openvino", "openvino") if precision == "bf16" else ("onnxruntime", "cpu")


def check_graphs(bundle: Bundle, cases: dict[str, GraphCase]) -> str:
    """Run every graph on the CPU, by the engine that `checking_library` names; returns a line on how close they are.

    Raises CheckFailed, naming graph and output, beyond the stage's tolerance. Where the library is not installed
    nothing is run, and the line says so.
    """
    name, extra = checking_library(bundle.manifest.precision)
    if importlib.util.find_spec(name) is None:
        return f"graphs passed the ONNX checker; not run: {name} is missing (pip install 'far-deploy[{extra}]')"
    run = _on_openvino if name == "openvino" else _on_onnxruntime
    worst = 0.0
    for graph, outputs in run(bundle, cases):
        for spec, output in zip(graph.outputs, outputs, strict=True):
            error = compare(output, cases[graph.name].outputs[spec.name]).error
            if graph.precision != "fp32" and not np.isfinite(output).all():
                overflow = tensor_ranges(bundle.path / graph.file, [cases[graph.name].inputs]).overflow
                raise CheckFailed(
                    f"graph {graph.name}: {spec.name} holds NaN or Inf at {graph.precision}: "
                    f"{overflow or 'unknown where'}; export it with "
                    + ("a precision of a larger range, bf16 or fp32" if graph.precision == "fp16" else "fp32")
                )
            if not error <= graph.tolerance:
                raise _mismatch(graph, spec.name, error)
            worst = max(worst, error)
    library = "OpenVINO" if name == "openvino" else "ONNX Runtime"
    return f"graphs passed the ONNX checker; {library} agrees with torch within {worst:.1e} relative"


def _mismatch(graph: Graph, output: str, error: float) -> CheckFailed:
    instead = () if graph.precision == "fp32" else ("use ", SettingName("precision"), " fp32; if that fails too, ")
    return CheckFailed(
        f"graph {graph.name}: {output} differs from the torch module by {error:.2e} relative, {graph.tolerance:.0e} is "
        f"allowed at {graph.precision}; ",
        *instead,
        "this is a fault of the export: please report it with the versions of torch and onnxscript",
    )


def _on_openvino(bundle: Bundle, cases: dict[str, GraphCase]) -> Iterator[tuple[Graph, list[NDArray[Any]]]]:
    engine = open_engine(bundle, "openvino")
    for graph in bundle.manifest.graphs:
        inputs = {name: engine.put(array) for name, array in cases[graph.name].inputs.items()}
        outputs = engine.run(graph.stage, inputs, graph.constants)
        yield graph, [engine.get(outputs[spec.name]) for spec in graph.outputs]
    engine.close()


def _on_onnxruntime(bundle: Bundle, cases: dict[str, GraphCase]) -> Iterator[tuple[Graph, list[NDArray[Any]]]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # A packed copy of the weights does not pay for one run.
    options.add_session_config_entry("session.disable_prepacking", "1")
    for graph in bundle.manifest.graphs:
        path = str(bundle.path / graph.file)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        yield graph, session.run([spec.name for spec in graph.outputs], cases[graph.name].inputs)
