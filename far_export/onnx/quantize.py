"""Static quantisation of an exported FP32 bundle: int8 matrix products and convolutions in QDQ format.

Quantised are the matrix products with a constant weight in the transformer, the diffusion head and VAR's logits, and
the convolutions of the VAE's decoder. Weights are quantised per output channel, activations per tensor, both
symmetrically; biases stay FP32. TensorRT, TensorRT-RTX and OpenVINO take this form.

Left in FP32 are:
- attention's two products, which have no constant weight;
- the layers that read or predict the latents, or give the pixels: the input projection, the head's final layer, the
  decoder's first two convolutions and its last one. They are a small part of the arithmetic, and cost most accuracy;
- what is the same for all rows: the embeddings of the timestep and the level.

docs/precision.md has the measurements behind these choices.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from far_export.onnx.calibration import calibrate
from far_export.onnx.writer import INLINE_BYTES, WeightFile
from far_export.tolerances import LIMITS
from far_runtime.bundle import MANIFEST, WEIGHTS, Bundle, Graph, Manifest, record_of
from far_runtime.errors import CheckFailed, SettingName

MATRICES = ("MatMul", "Gemm")
CONVOLUTIONS = ("Conv",)
QUANTIZED_OPERATORS = (*MATRICES, *CONVOLUTIONS)
STAGES = {"transformer": MATRICES, "denoise": MATRICES, "logits": MATRICES, "decode": CONVOLUTIONS}
"""The operators that are quantised, by stage."""

TOLERANCE = LIMITS["int8"].stage
"""Relative error of a quantised graph's output that verify accepts. It tells a broken quantisation from a sound one;
the distribution check says whether the pictures are good."""


@dataclass(frozen=True)
class MatMul:
    """A matrix product or convolution that is to be quantised."""

    node: str
    """The node's name."""

    activation: str
    """The tensor that it multiplies with its weight."""


def quantize_bundle(folder: Path, manifest: Manifest, count: int, report: Callable[[str], None]) -> Manifest:
    """Quantise the FP32 bundle in `folder` in place, calibrated on `count` pictures; returns its new manifest, which
    is not written.

    Graphs and weight file are written to a folder beside, and replace the old ones at the end. Raises FarError where
    onnxruntime is not installed and CheckFailed where there is nothing to quantise.
    """
    bundle = Bundle(folder, manifest)
    candidates = {
        graph.name: matmuls_of(folder / graph.file, graph, manifest.model.channels)
        for graph in manifest.graphs
        if graph.stage in STAGES
    }
    if not any(candidates[graph.name] for graph in manifest.graphs if STAGES.get(graph.stage) is MATRICES):
        raise CheckFailed(
            f"{folder}: no matrix product to quantise; export it with ", SettingName("precision"), " fp32"
        )
    tensors = {name: list(dict.fromkeys(m.activation for m in matmuls)) for name, matmuls in candidates.items()}
    ranges = calibrate(bundle, tensors, count, report)
    quantised = {
        name: [matmul for matmul in matmuls if matmul.activation in ranges.get(name, {})]
        for name, matmuls in candidates.items()
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".int8.") as temporary:
        aside = Path(temporary)
        with (aside / WEIGHTS).open("wb") as file:
            weights = WeightFile(file)
            for graph in manifest.graphs:
                matmuls = quantised.get(graph.name, [])
                model = _load(folder / graph.file, matmuls, ranges.get(graph.name, {}))
                _write(model, aside / graph.file, weights)
                if matmuls:
                    report(f"quantised {graph.name}: {len(matmuls)} of {_count(model, graph)}")
                del model
        for path in aside.iterdir():
            os.replace(path, folder / path.name)
    graphs = tuple(
        replace(graph, precision="int8", tolerance=max(graph.tolerance, TOLERANCE))
        if quantised.get(graph.name)
        else graph
        for graph in manifest.graphs
    )
    files = {path.name: record_of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    return replace(
        manifest, graphs=graphs, files=files, precision="int8", source={**manifest.source, "calibrate": count}
    )


def matmuls_of(path: Path, graph: Graph, channels: int) -> list[MatMul]:
    """The matrix products and convolutions of an ONNX file that are to be quantised.

    channels: those of the latents. A matrix product that reads so many channels, or predicts at most twice as many
    (with the variance), is left out.
    """
    model = onnx.load(str(path), load_external_data=False).graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.initializer if len(tensor.dims) in (2, 4)}
    convolutions = [node.name for node in model.node if node.op_type in CONVOLUTIONS]
    # post_quant_conv and conv_in read the latents, conv_out gives the pixels.
    ends = {*convolutions[:2], *convolutions[-1:]}
    # Tensors that depend on an input with an axis of any length differ between rows; the rest is computed once a call.
    varying = {spec.name for spec in graph.inputs if any(isinstance(axis, str) for axis in spec.shape)}
    for node in model.node:
        if node.op_type != "Shape" and any(name in varying for name in node.input):
            varying.update(node.output)
    return [
        MatMul(node.name, node.input[0])
        for node in model.node
        if node.op_type in STAGES[graph.stage]
        and node.input[0] in varying
        and node.input[1] in weights
        and not (node.name in ends or _touches_latents(node, weights[node.input[1]], channels))
    ]


def _touches_latents(node: onnx.NodeProto, weight: tuple[int, ...], channels: int) -> bool:
    if node.op_type in CONVOLUTIONS:
        # A decoder's inner convolutions may have as few channels as latents.
        return False
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    rows, columns = reversed(weight) if transposed else weight
    return rows <= channels or columns <= 2 * channels


def _load(path: Path, matmuls: Sequence[MatMul], ranges: Mapping[str, float]) -> ir.Model:
    """A graph, with these nodes quantised."""
    if not matmuls:
        return ir.load(path)
    model = onnx.load(str(path))  # the quantiser reads the weights
    return ir.from_proto(quantize_graph(model, matmuls, ranges))


def quantize_graph(model: onnx.ModelProto, matmuls: Sequence[MatMul], ranges: Mapping[str, float]) -> onnx.ModelProto:
    """ONNX Runtime's QDQ quantiser on some nodes of a model, which it changes in place.

    ranges: largest absolute value of every activation.
    """
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    calibrate_module: Any = importlib.import_module("onnxruntime.quantization.calibrate")
    quantizer_module: Any = importlib.import_module("onnxruntime.quantization.qdq_quantizer")
    int8, method = quantization.QuantType.QInt8, quantization.CalibrationMethod.MinMax
    bounds = {matmul.activation: np.float32(ranges[matmul.activation]) for matmul in matmuls}
    data = {name: calibrate_module.TensorData(lowest=-bound, highest=bound) for name, bound in sorted(bounds.items())}
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,  # TensorRT-RTX refuses a bias in int32
        "OpTypesToExcludeOutputQuantization": list(QUANTIZED_OPERATORS),
    }
    with _quiet():
        quantizer = quantizer_module.QDQQuantizer(
            model, True, False, int8, int8, calibrate_module.TensorsData(method, data),
            [matmul.node for matmul in matmuls], [], list(QUANTIZED_OPERATORS), options,
        )  # fmt: skip
        quantizer.quantize_model()
    quantised: onnx.ModelProto = quantizer.model.model
    return quantised


def _write(model: ir.Model, path: Path, weights: WeightFile) -> None:
    """Write a graph's file, and its weights into the shared weight file."""
    model.graph.sort()  # the quantiser appends its nodes
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
            value.const_value = weights.add(value.const_value, path.parent)
    ir.save(model, path)
    onnx.checker.check_model(str(path))


def _count(model: ir.Model, graph: Graph) -> str:
    operators = STAGES[graph.stage]
    noun = "matrix products" if operators is MATRICES else "convolutions"
    return f"{sum(node.op_type in operators for node in model.graph)} {noun}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the quantiser's advice to run its preprocessing first."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
