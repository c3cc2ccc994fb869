"""The precision of an exported graph, proved node by node: matrix products in 16 bits, what overflows in FP32."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from far_export.cast import island_paths, whole
from far_export.stages.stage import Stage
from far_runtime.errors import CheckFailed

PRODUCTS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"))
WIDE = frozenset(
    (
        "Softmax", "LogSoftmax", "LayerNormalization", "GroupNormalization", "InstanceNormalization",
        "RMSNormalization", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp",
        "LpNormalization", "CumSum", "Exp", "Log", "Sin", "Cos", "Sqrt", "Reciprocal", "Pow", "Round",
    )
)  # fmt: skip
"""Operators that lose too much in 16 bits, or leave FP16's range."""

MOVES = frozenset(("Gather", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Slice", "Identity", "Expand"))
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT}
SCOPES = "pkg.torch.onnx.name_scopes"
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def check_graph_precision(model: ir.Model, stage: Stage) -> None:
    """CheckFailed, naming the first node that does not compute in the stage's precision: a matrix product or
    convolution of another type (FP32 ones only on the stage's islands), or an operator of WIDE that is not FP32."""
    expected = TYPES[stage.precision]
    islands = [] if whole(stage) else island_paths(stage)
    products = 0
    for node in model.graph:
        types = {value.dtype for value in node.inputs if value is not None and value.dtype in FLOATS}
        if node.op_type in PRODUCTS:
            fine = types == {expected} or (types == {ir.DataType.FLOAT} and _on_island(node, islands))
            products += types == {expected}
            wanted: ir.DataType = expected
        elif node.op_type in WIDE:
            fine, wanted = types <= {ir.DataType.FLOAT}, ir.DataType.FLOAT
        else:
            continue
        if not fine:
            raise CheckFailed(
                f"graph {stage.name}: node {node.name} ({node.op_type} in {module_path(node) or 'the stage itself'}) "
                f"computes in {', '.join(sorted(str(kind) for kind in types))}, expected {wanted}; declare or mark an "
                "FP32 island there, or cast its inputs"
            )
    if not products and stage.precision != "fp32":
        raise CheckFailed(
            f"graph {stage.name}: has no matrix product in {stage.precision}; name the stage among its own fp32_islands"
        )


def module_path(node: ir.Node) -> str:
    """Path of the torch module that a node came from, "" at the top: before the exporter's notes are removed."""
    scopes = _literal(node.metadata_props.get(SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope and not scope.startswith("_empty")]
    return modules[-1] if modules else ""


def _literal(text: str) -> list[str]:
    return [single or double for single, double in re.findall(r"'([^']*)'|\"([^\"]*)\"", text)]


def _on_island(node: ir.Node, islands: Sequence[str]) -> bool:
    path = module_path(node)
    if _inside(path, islands):
        return True
    return any(_inside(name, islands) for value in node.inputs if value is not None for name in _sources(value))


def _inside(path: str, islands: Sequence[str]) -> bool:
    """Whether a module's or initializer's path is an island or inside one; the exporter numbers names that clash."""
    names = (path, re.sub(r"_\d+$", "", path))
    return any(name == island or name.startswith(f"{island}.") for name in names for island in islands)


def _sources(value: ir.Value) -> list[str]:
    """Initializers that a value is, or was cut from."""
    producer: Any = value.producer()
    if producer is None:
        return [value.name or ""]
    if producer.op_type in MOVES and producer.inputs and producer.inputs[0] is not None:
        return _sources(producer.inputs[0])
    return []
