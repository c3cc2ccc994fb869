"""Stages into ONNX files that share one weight file."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
import torch

from far_export.cast import check_islands
from far_export.onnx.graph_precision import check_graph_precision, module_path
from far_export.stages.stage import Stage
from far_models.islands import recorded_islands
from far_runtime.bundle import WEIGHTS, Graph

OPSET = 20
"""TensorRT 10.3 parses up to opset 20; LayerNormalization (17) and Gelu (20) are single nodes in it."""

INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph's file."""

PAGE = 4096


class WeightFile:
    """The external data file of a bundle, which holds every distinct tensor once, whichever graphs use it.

    Tensors are written as they come, so that memory holds one at a time. The offsets of large tensors are multiples of
    4096, so that a reader can map them into memory.
    """

    def __init__(self, file: BinaryIO, name: str = WEIGHTS) -> None:
        self.name = name
        self._file = file
        self._places: dict[tuple[str, str], tuple[int, int]] = {}

    def add(self, tensor: ir.TensorProtocol, folder: Path) -> ir.ExternalTensor:
        """Store a tensor, unless it is stored already; returns the external tensor that takes its place."""
        data: Any = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
        key = (hashlib.sha256(data).hexdigest(), tensor.dtype.name)
        if key not in self._places:
            align = PAGE if data.nbytes >= PAGE else 64
            self._file.write(b"\0" * (-self._file.tell() % align))
            self._places[key] = (self._file.tell(), data.nbytes)
            self._file.write(data)
        offset, length = self._places[key]
        shape: Any = tensor.shape
        return ir.ExternalTensor(
            self.name, offset, length, tensor.dtype, shape=ir.Shape(shape), name=tensor.name or "", base_dir=folder
        )


def export_stages(
    stages: Sequence[Stage], folder: Path, report: Callable[[str], None] = lambda line: None
) -> tuple[Graph, ...]:
    """Write every stage as NAME.onnx, and their weights as weights.bin, into `folder`; returns the manifest's entries.

    Raises CheckFailed where a graph does not compute in its stage's precision.
    """
    graphs = []
    with (folder / WEIGHTS).open("wb") as file:
        weights = WeightFile(file)
        for stage in stages:
            graphs.append(_export(stage, folder, weights))
            report(f"exported {stage.name} ({graphs[-1].parameters / 1e6:.1f} M parameters)")
    return tuple(graphs)


def _export(stage: Stage, folder: Path, weights: WeightFile) -> Graph:
    sizes = {axis: _traced_size(axis, usual) for axis, (_, usual, _) in stage.profile.items()}
    program = _trace(stage, stage.example(sizes))
    model = program.model
    check_graph_precision(model, stage)
    parameters = 0
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
            parameters += value.const_value.size
            value.const_value = weights.add(value.const_value, folder)
    _strip(model)
    path = folder / f"{stage.name}.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path))
    return Graph(
        name=stage.name,
        stage=stage.stage,
        file=path.name,
        inputs=tuple(spec.spec for spec in stage.inputs),
        outputs=stage.outputs,
        tolerance=stage.tolerance,
        constants=dict(stage.constants),
        flops=dict(stage.flops),
        parameters=parameters,
        profile={axis: (low, usual, high) for axis, (low, usual, high) in stage.profile.items()},
        precision=stage.precision,
    )


def _traced_size(axis: str, usual: int) -> int:
    """The length of an axis while it is traced.

    Lengths differ from each other and from 0 and 1: torch.export would take an axis of length 0 or 1 for constant, and
    axes of one length for the same.
    """
    return {"batch": 3, "rows": 6}.get(axis, max(usual, 2) + 1)


def _trace(stage: Stage, example: Mapping[str, torch.Tensor]) -> Any:
    shapes = {
        spec.name: {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(spec.shape) if isinstance(axis, str)}
        for spec in stage.inputs
    }
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad(), recorded_islands() as passed:
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            stage.module,
            args=(),
            kwargs=dict(example),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[spec.name for spec in stage.inputs],
            output_names=[spec.name for spec in stage.outputs],
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    check_islands(stage, passed)
    return program


def _strip(model: ir.Model) -> None:
    """Remove the exporter's metadata, which holds source lines and folders of this machine, and name the nodes by their
    modules."""
    model.metadata_props.clear()
    graphs: list[Any] = [model.graph, *model.functions.values()]
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        for i, node in enumerate(ir.traversal.RecursiveGraphIterator(graph)):
            # Engines and their profilers show these names.
            node.name = "/".join(part for part in (module_path(node), f"{node.op_type}_{i}") if part)
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
