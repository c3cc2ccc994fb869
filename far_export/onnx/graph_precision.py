"""The precision of an exported graph, proved node by node: matrix products in 16 bits, and in FP32 the operators that
lose too much."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from far_export.cast import island_paths, stays_fp32
from far_export.stages.stage import Stage
from far_runtime.errors import CheckFailed

MATMUL_OPERATORS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"))
FP32_OPERATORS = frozenset(
    (
        "Softmax", "LogSoftmax", "LayerNormalization", "GroupNormalization", "InstanceNormalization",
        "RMSNormalization", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp",
        "LpNormalization", "CumSum", "Exp", "Log", "Sin", "Cos", "Sqrt", "Reciprocal", "Pow", "Round",
    )
)  # fmt: skip
"""Operators that lose too much in 16 bits, or leave FP16's range."""

COPY_OPERATORS = frozenset(("Gather", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Slice", "Identity", "Expand"))
DATA_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT}
SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch.onnx keeps the path of a node's module."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def check_graph_precision(model: ir.Model, stage: Stage) -> None:
    """CheckFailed, naming the first node that does not compute in the stage's precision.

    A matrix product or convolution has to have the stage's precision, or FP32 on one of the stage's islands; operators
    of FP32_OPERATORS have to be FP32.
    """
    expected = DATA_TYPES[stage.precision]
    islands = [] if stays_fp32(stage) else island_paths(stage)
    matmuls = 0
    for node in model.graph:
        types = {value.dtype for value in node.inputs if value is not None and value.dtype in FLOATS}
        if node.op_type in MATMUL_OPERATORS:
            allowed = types == {expected} or (types == {ir.DataType.FLOAT} and _on_island(node, islands))
            matmuls += types == {expected}
            required: ir.DataType = expected
        elif node.op_type in FP32_OPERATORS:
            allowed, required = types <= {ir.DataType.FLOAT}, ir.DataType.FLOAT
        else:
            continue
        if not allowed:
            raise CheckFailed(
                f"graph {stage.name}: node {node.name} ({node.op_type} in {module_path(node) or 'the stage itself'}) "
                f"computes in {', '.join(sorted(map(str, types)))}, expected {required}; declare or mark an "
                "FP32 island there, or cast its inputs"
            )
    if not matmuls and stage.precision != "fp32":
        raise CheckFailed(
            f"graph {stage.name}: has no matrix product in {stage.precision}; name the stage among its own fp32_islands"
        )


def module_path(node: ir.Node) -> str:
    """Path of the torch module that a node came from, "" at the top; known until the exporter's metadata is removed."""
    scopes = _strings(node.metadata_props.get(SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope and not scope.startswith("_empty")]
    return modules[-1] if modules else ""


def _strings(text: str) -> list[str]:
    """The strings of a list in Python's notation."""
    return [single or double for single, double in re.findall(r"'([^']*)'|\"([^\"]*)\"", text)]


def _on_island(node: ir.Node, islands: Sequence[str]) -> bool:
    path = module_path(node)
    if _inside(path, islands):
        return True
    return any(_inside(name, islands) for value in node.inputs if value is not None for name in _sources(value))


def _inside(path: str, islands: Sequence[str]) -> bool:
    """Whether a module's or initializer's path is an island or inside one."""
    # The exporter numbers names that clash: "norm" and "norm_1".
    names = (path, re.sub(r"_\d+$", "", path))
    return any(name == island or name.startswith(f"{island}.") for name in names for island in islands)


def _sources(value: ir.Value) -> list[str]:
    """Names of the initializers that a value is, or is a part of."""
    producer: Any = value.producer()
    if producer is None:
        return [value.name or ""]
    if producer.op_type in COPY_OPERATORS and producer.inputs and producer.inputs[0] is not None:
        return _sources(producer.inputs[0])
    return []
