"""The range of every tensor that a graph computes, measured on ONNX Runtime, and whether any overflows.

ONNX Runtime's CPU provider computes FP16 graphs in float32: a value that would be infinite on a GPU stays finite there.
As an output of the graph, though, a tensor has the graph's own type, and is infinite beyond FP16's range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

FP16_MAX = 65504.0
RUN_TENSORS, RUN_BYTES = 128, 1 << 28
"""Most tensors, and about the most bytes, that are observed in one run: a large graph's tensors do not fit into memory
together."""

Observed = tuple[ir.Node, ir.Value]
"""A tensor, and the node that computes it."""

OBSERVED_TYPES = {ir.DataType.FLOAT: "FP32", ir.DataType.FLOAT16: "FP16"}


@dataclass(frozen=True)
class TensorRange:
    """The values of a graph's tensors over some calls."""

    largest: float = 0.0
    """Largest absolute value in any FP16 tensor."""

    tensor: str = ""
    """Name of the node that computed it."""

    overflow: str = ""
    """A sentence on the first tensor, in the graph's order, that held NaN or Inf; "" where there was none."""

    calls: int = 0
    """Number of calls that were observed."""

    skipped: str = ""
    """Why nothing was observed, "" where something was."""


def tensor_ranges(path: Path, calls: Sequence[Mapping[str, NDArray[Any]]]) -> TensorRange:
    """The range of every tensor that the graph in `path` computes for the inputs of some calls.

    Nothing is observed without onnxruntime, or where it has no kernel for an operator (BF16). No file is written: the
    bundle's folder may be read-only, and another process may do the same.
    """
    try:
        import onnxruntime
    except ImportError:
        return TensorRange(skipped="onnxruntime is not installed: pip install 'far-deploy[cpu]'")
    model = ir.load(path)
    observed = [
        (node, value)
        for node in model.graph
        for value in node.outputs
        if value.name and value.dtype in OBSERVED_TYPES and node.op_type != "Constant"
    ]
    outputs = list(model.graph.outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Operators that the optimiser fuses would have no tensors between them.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Weights that were converted to float32 are given back after use.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    largest, tensor = 0.0, ""
    try:
        rows = max((array.shape[0] for inputs in calls for array in inputs.values() if array.ndim), default=1)
        for part in _parts(observed, rows):
            model.graph.outputs[:] = outputs + [value for _, value in part if value not in outputs]
            graph = ir.to_proto(model).SerializeToString()
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            names = [str(value.name) for _, value in part]
            for inputs in calls:
                computed = dict(zip(names, session.run(names, dict(inputs)), strict=True))
                for node, value in part:
                    array = computed[str(value.name)]
                    if not np.isfinite(array).all():
                        return TensorRange(largest, tensor, _sentence(node, value, array, computed), len(calls))
                    if value.dtype == ir.DataType.FLOAT16 and array.size:
                        largest, tensor = max((largest, tensor), (float(np.abs(array).max()), str(node.name)))
    # onnxruntime raises many types, and the comparison of outputs goes on without the ranges.
    except Exception as error:
        return TensorRange(skipped=f"onnxruntime does not run it ({' '.join(str(error).split())[:200]})")
    return TensorRange(largest, tensor, "", len(calls))


def _parts(observed: Sequence[Observed], rows: int) -> Iterator[list[Observed]]:
    """Consecutive tensors that are observed in one run. rows: what the product of a shape's axes of any length is taken
    for."""
    part: list[Observed] = []
    size = 0
    for node, value in observed:
        tensor_bytes = 4 * rows * math.prod(axis for axis in value.shape or () if isinstance(axis, int))
        if part and (len(part) == RUN_TENSORS or size + tensor_bytes > RUN_BYTES):
            yield part
            part, size = [], 0
        part.append((node, value))
        size += tensor_bytes
    if part:
        yield part


def _sentence(node: ir.Node, value: ir.Value, array: NDArray[Any], computed: Mapping[str, NDArray[Any]]) -> str:
    nonfinite = int(array.size - np.isfinite(array).sum())
    inputs = [computed[str(value.name)] for value in node.inputs if value is not None and value.name in computed]
    before = max((float(np.abs(x.astype(np.float64)).max(initial=0.0)) for x in inputs), default=0.0)
    dtype = OBSERVED_TYPES[value.dtype] if value.dtype is not None else ""
    return (
        f"the first is tensor {value.name} ({dtype}) of node {node.name} ({node.op_type}): {nonfinite} of "
        f"{array.size} values"
        + (f", from values up to {before:.3g}" if 0 < before < np.inf else "")
        + (f"; FP16 ends at {FP16_MAX:.0f}" if value.dtype == ir.DataType.FLOAT16 else "")
    )
