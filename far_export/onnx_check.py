"""Exported graphs are run once on ONNX Runtime and compared with the torch modules that they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from far_export.compare import compare
from far_export.stages import Stage
from far_runtime.bundle import Bundle
from far_runtime.errors import CheckFailed

SIZES = {"batch": 2, "rows": 4}


@dataclass(frozen=True)
class Case:
    """Inputs and outputs by name of one torch run of a stage."""

    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]


def reference_outputs(stages: Sequence[Stage]) -> dict[str, Case]:
    """One run of every stage's torch module, at other sizes than the ones that were traced, by graph name."""
    cases = {}
    for stage in stages:
        sizes = {axis: SIZES.get(axis, (low + usual) // 2) for axis, (low, usual, _) in stage.profile.items()}
        example = stage.example(sizes, seed=1)
        with torch.inference_mode():
            outputs = stage.module(**example)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        cases[stage.name] = Case(
            {name: tensor.numpy() for name, tensor in example.items()},
            {spec.name: tensor.numpy() for spec, tensor in zip(stage.outputs, outputs, strict=True)},
        )
    return cases


def check_graphs(bundle: Bundle, cases: dict[str, Case]) -> str:
    """Run every graph on ONNX Runtime's CPU provider; returns a line that says how close they are.

    Raises CheckFailed, naming graph and output, beyond the stage's tolerance. Without onnxruntime nothing is run, and
    the line says so.
    """
    try:
        import onnxruntime
    except ImportError:
        return "graphs passed the ONNX checker; not run: onnxruntime is missing (pip install 'far-deploy[cpu]')"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # A packed copy of the weights does not pay for one run.
    options.add_session_config_entry("session.disable_prepacking", "1")
    worst = 0.0
    for graph in bundle.manifest.graphs:
        case = cases[graph.name]
        path = str(bundle.path / graph.file)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        outputs = session.run([spec.name for spec in graph.outputs], case.inputs)
        for spec, output in zip(graph.outputs, outputs, strict=True):
            error = compare(output, case.outputs[spec.name]).error
            if not error <= graph.tolerance:
                raise CheckFailed(
                    f"graph {graph.name}: {spec.name} differs from the torch module by {error:.2e} relative, "
                    f"{graph.tolerance:.0e} is allowed; this is a fault of the export: please report it with the "
                    "versions of torch and onnxscript"
                )
            worst = max(worst, error)
    return f"graphs passed the ONNX checker; ONNX Runtime agrees with torch within {worst:.1e} relative"
