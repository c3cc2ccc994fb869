"""Whether numbers leave their range inside of a graph: every tensor that it computes, looked at on ONNX Runtime.

ONNX Runtime's CPU provider computes FP16 graphs in float32: what would be infinite on a GPU goes on as a number there.
As an output of the graph, though, a tensor is of the graph's own type, and infinite where FP16 ends.
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
AT_A_TIME, BYTES = 128, 1 << 28
"""Tensors that are looked at in one run, and about how much they may take together: a large graph's do not all fit."""

Watched = tuple[ir.Node, ir.Value]
"""A tensor, and the node that computes it."""

SEEN = {ir.DataType.FLOAT: "FP32", ir.DataType.FLOAT16: "FP16"}


@dataclass(frozen=True)
class TensorRange:
    """What a graph's tensors came to over some calls.

    largest: the largest number in any FP16 tensor, and its name in `tensor`. overflow: the first tensor, in the graph's
    order, that held NaN or Inf, in words; "" where there was none. calls: how many were looked at. unseen: why it could
    not be done here, where it could not.
    """

    largest: float = 0.0
    tensor: str = ""
    overflow: str = ""
    calls: int = 0
    unseen: str = ""


def tensor_ranges(path: Path, calls: Sequence[Mapping[str, NDArray[Any]]]) -> TensorRange:
    """The range of everything that the graph in `path` computes for the inputs of some calls.

    Without onnxruntime, or with operators that it has no kernel for (BF16), nothing is looked at. Nothing is written:
    a bundle may lie where nobody writes, and another process may look at it too.
    """
    try:
        import onnxruntime
    except ImportError:
        return TensorRange(unseen="onnxruntime is not installed: pip install 'far-deploy[cpu]'")
    model = ir.load(path)
    watched = [
        (node, value)
        for node in model.graph
        for value in node.outputs
        if value.name and value.dtype in SEEN and node.op_type != "Constant"
    ]
    own = list(model.graph.outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # As the graph says: what the optimiser fuses has no tensors between.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # it holds every weight widened: give them back
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    largest, tensor = 0.0, ""
    try:
        rows = max((array.shape[0] for inputs in calls for array in inputs.values() if array.ndim), default=1)
        for part in _parts(watched, rows):
            model.graph.outputs[:] = own + [value for _, value in part if value not in own]
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
                        most = float(np.abs(array).max())
                        largest, tensor = max((largest, tensor), (most, str(node.name)))
    except Exception as error:  # onnxruntime raises many types; this is a help beside the comparison itself
        return TensorRange(unseen=f"onnxruntime does not run it ({' '.join(str(error).split())[:200]})")
    return TensorRange(largest, tensor, "", len(calls))


def _parts(watched: Sequence[Watched], rows: int) -> Iterator[list[Watched]]:
    """Neighbours that are looked at in one run. rows: what the open axes of a shape are taken for together."""
    part: list[Watched] = []
    size = 0
    for node, value in watched:
        dimensions = [one for one in value.shape or () if isinstance(one, int)]
        bytes_of = 4 * rows * math.prod(dimensions)
        if part and (len(part) == AT_A_TIME or size + bytes_of > BYTES):
            yield part
            part, size = [], 0
        part.append((node, value))
        size += bytes_of
    if part:
        yield part


def _sentence(node: ir.Node, value: ir.Value, array: NDArray[Any], computed: Mapping[str, NDArray[Any]]) -> str:
    bad = int(array.size - np.isfinite(array).sum())
    inputs = [computed[str(one.name)] for one in node.inputs if one is not None and one.name in computed]
    before = max((float(np.abs(part.astype(np.float64)).max(initial=0.0)) for part in inputs), default=0.0)
    kind = SEEN[value.dtype] if value.dtype is not None else ""
    return (
        f"the first is tensor {value.name} ({kind}) of node {node.name} ({node.op_type}): {bad} of {array.size} values"
        + (f", from values up to {before:.3g}" if 0 < before < np.inf else "")
        + (f"; FP16 ends at {FP16_MAX:.0f}" if value.dtype == ir.DataType.FLOAT16 else "")
    )
