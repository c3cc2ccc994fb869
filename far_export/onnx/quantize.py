"""Post-training quantisation of an exported FP32 bundle: int8 matrix products and convolutions in QDQ form, everything
else as it was.

Quantised are the products with a constant weight in the transformer, the diffusion head and VAR's logits, and the
convolutions of the VAE's decoder: weights per output channel, activations per tensor, both symmetric, biases in FP32,
as TensorRT, TensorRT-RTX and OpenVINO take it. Left in FP32 are attention's two products; those that read the latents
or predict them, or the pixels (the projection in, the head's final layer, the decoder's first and last convolution: a
small part of the arithmetic, and the part that costs most accuracy); and what is the same for all rows (the timestep's
and the level's embedding). docs/precision.md has the figures behind these choices.
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
from far_runtime.errors import CheckFailed

MATRICES = ("MatMul", "Gemm")
CONVOLUTIONS = ("Conv",)
PRODUCTS = (*MATRICES, *CONVOLUTIONS)
STAGES = {"transformer": MATRICES, "denoise": MATRICES, "logits": MATRICES, "decode": CONVOLUTIONS}
"""The operators that are quantised, by stage."""

TOLERANCE = LIMITS["int8"].stage
"""Relative error of a quantised graph's output that verify accepts. It tells a broken quantisation from a sound one;
whether the pictures are good the distribution check says."""


@dataclass(frozen=True)
class MatMul:
    """A product to be quantised: its node's name and the tensor that it multiplies with the weight."""

    node: str
    activation: str


def quantize_bundle(folder: Path, manifest: Manifest, count: int, report: Callable[[str], None]) -> Manifest:
    """Quantise the FP32 bundle in `folder` in place, calibrated on `count` pictures; returns its new manifest, which
    is not written.

    Graphs and weight file are made anew aside and take the old ones' places at the end; no byte that no graph reads
    stays. Raises FarError where onnxruntime is missing and CheckFailed where there is nothing to quantise.
    """
    bundle = Bundle(folder, manifest)
    found = {
        graph.name: products_of(folder / graph.file, graph, manifest.model.channels)
        for graph in manifest.graphs
        if graph.stage in STAGES
    }
    if not any(found[graph.name] for graph in manifest.graphs if STAGES.get(graph.stage) is MATRICES):
        raise CheckFailed(f"{folder}: no matrix product to quantise; export it with --precision fp32")
    watched = {name: list(dict.fromkeys(one.activation for one in products)) for name, products in found.items()}
    ranges = calibrate(bundle, watched, count, report)
    quantised = {
        name: [product for product in products if product.activation in ranges.get(name, {})]
        for name, products in found.items()
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".int8.") as made:
        aside = Path(made)
        with (aside / WEIGHTS).open("wb") as file:
            weights = WeightFile(file)
            for graph in manifest.graphs:
                products = quantised.get(graph.name, [])
                model = _load(folder / graph.file, products, ranges.get(graph.name, {}))
                _write(model, aside / graph.file, weights)
                if products:
                    report(f"quantised {graph.name}: {len(products)} of {_count(model, graph)}")
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


def products_of(path: Path, graph: Graph, channels: int) -> list[MatMul]:
    """The products of an ONNX file that are to be quantised. channels: of the latents, which the excluded products read
    (channels in) or predict (twice as many out, with the variance)."""
    model = onnx.load(str(path), load_external_data=False).graph
    weights = {one.name: tuple(one.dims) for one in model.initializer if len(one.dims) in (2, 4)}
    convolutions = [node.name for node in model.node if node.op_type in CONVOLUTIONS]
    # post_quant_conv and conv_in read the latents, conv_out gives the pixels.
    ends = {*convolutions[:2], *convolutions[-1:]}
    # What depends on an input with an axis of any length differs from row to row; the rest is computed once a call.
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
        return False  # a decoder's inner convolutions may be as narrow as latents are
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    rows, columns = reversed(weight) if transposed else weight
    return rows <= channels or columns <= 2 * channels


def _load(path: Path, products: Sequence[MatMul], ranges: Mapping[str, float]) -> ir.Model:
    """A graph, with these products quantised."""
    if not products:
        return ir.load(path)
    model = onnx.load(str(path))  # the quantiser reads the weights
    return ir.from_proto(quantize_graph(model, products, ranges))


def quantize_graph(model: onnx.ModelProto, products: Sequence[MatMul], ranges: Mapping[str, float]) -> onnx.ModelProto:
    """ONNX Runtime's quantiser on some products of a model, with the activations' ranges given; uses the model up."""
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    calibrate_module: Any = importlib.import_module("onnxruntime.quantization.calibrate")
    quantizer_module: Any = importlib.import_module("onnxruntime.quantization.qdq_quantizer")
    int8, method = quantization.QuantType.QInt8, quantization.CalibrationMethod.MinMax
    bounds = {one.activation: np.float32(ranges[one.activation]) for one in products}
    data = {name: calibrate_module.TensorData(lowest=-bound, highest=bound) for name, bound in sorted(bounds.items())}
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,  # TensorRT-RTX refuses a bias in int32
        "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
    }
    with _quiet():
        quantizer = quantizer_module.QDQQuantizer(
            model, True, False, int8, int8, calibrate_module.TensorsData(method, data),
            [one.node for one in products], [], list(PRODUCTS), options,
        )  # fmt: skip
        quantizer.quantize_model()
    made: onnx.ModelProto = quantizer.model.model
    return made


def _write(model: ir.Model, path: Path, weights: WeightFile) -> None:
    """A graph as a file, its weights in the shared weight file."""
    model.graph.sort()  # the quantiser appends its nodes
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
            value.const_value = weights.add(value.const_value, path.parent)
    ir.save(model, path)
    onnx.checker.check_model(str(path))


def _count(model: ir.Model, graph: Graph) -> str:
    operators = STAGES[graph.stage]
    kind = "matrix products" if operators is MATRICES else "convolutions"
    return f"{sum(node.op_type in operators for node in model.graph)} {kind}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice to run its own preprocessing first."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
