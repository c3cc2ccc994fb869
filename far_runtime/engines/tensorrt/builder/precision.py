"""Precisions of matrix products and convolutions, in the network and in the finished engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION")
PASSED_THROUGH = ("SHUFFLE", "CONSTANT", "IDENTITY", "SLICE")
"""Layers that may lie between a DequantizeLinear and the product: they only move values."""

NAMES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
MAX_NAMES = 3


@dataclass(frozen=True)
class MatMul:
    """A matrix product or convolution."""

    name: str
    """The ONNX node that it came from."""
    precision: str
    """Precision of its operands, such as "fp16"."""


def network_products(trt: Any, network: Any) -> list[MatMul]:
    """The products of a parsed, strongly typed network, with the types of its graph.

    A product of dequantised operands counts as int8.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    producer = {layer.get_output(j).name: layer for layer in layers for j in range(layer.num_outputs)}
    products = []
    for layer in layers:
        if layer.type.name not in PRODUCTS:
            continue
        operands = [layer.get_input(j) for j in range(min(layer.num_inputs, 2)) if layer.get_input(j) is not None]
        quantised = all(_is_dequantised(operand.name, producer) for operand in operands)
        precision = "int8" if quantised else NAMES.get(operands[0].dtype.name, operands[0].dtype.name.lower())
        names = _onnx_names(layer.metadata)
        products.append(MatMul(names[0] if names else layer.name, precision))
    return products


def _is_dequantised(tensor: str, producer: Mapping[str, Any]) -> bool:
    for _ in range(len(producer)):
        layer = producer.get(tensor)
        if layer is None:
            return False
        if layer.type.name == "DEQUANTIZE":
            return True
        if layer.type.name not in PASSED_THROUGH or not layer.num_inputs or layer.get_input(0) is None:
            return False
        tensor = layer.get_input(0).name
    return False


def missing(products: Sequence[MatMul], precision: str) -> str:
    """Why a network does not have the precision that its manifest states; "" if it has.

    In 16 bits, more than half of the products must have it: the others lie on FP32 islands. In int8 one is enough:
    those of attention and those that cost accuracy are not quantised. A graph without products has any precision.
    """
    count = sum(product.precision == precision for product in products)
    enough = count >= 1 if precision == "int8" else 2 * count > len(products)
    if not products or precision == "fp32" or enough:
        return ""
    have = ", ".join(sorted({product.precision for product in products}))
    return f"the manifest says {precision}, but its {len(products)} matrix products are {have}; export the bundle again"


def engine_products(trt: Any, data: Any) -> list[MatMul]:
    """The products of a serialised engine by the engine inspector; every ONNX node of a layer has the precision of the
    layer's narrowest operand."""
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(data)
    if engine is None:
        return []
    inspector = engine.create_engine_inspector()
    return inspected(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def inspected(information: str) -> list[MatMul]:
    """The ONNX nodes in the inspector's JSON, with the precision of their layer."""
    products = []
    for layer in json.loads(information).get("Layers", ()):
        # An engine that was built without details has only the names of its layers.
        if not isinstance(layer, dict):
            continue
        types = [name for side in ("Inputs", "Outputs") for tensor in layer.get(side, ()) if (name := _type(tensor))]
        if types:
            narrowest = min(types, key=lambda name: WIDTHS.get(name, 4))
            products += [MatMul(name, narrowest) for name in _onnx_names(layer.get("Metadata", ""))]
    return products


WIDTHS = {"int8": 1, "fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4}
TYPES = (("bf16", r"bf16|bfloat16"), ("fp16", r"fp16|half"), ("fp8", r"fp8"), ("int8", r"int8"),
         ("fp32", r"fp32|float"))  # fmt: skip


def _type(tensor: Mapping[str, Any]) -> str:
    """Precision by the name of a tensor's format, such as "Row major linear FP16 format" or "Half"; else ""."""
    text = str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))).lower()
    return next((name for name, pattern in TYPES if re.search(pattern, text)), "")


def _onnx_names(metadata: str | None) -> list[str]:
    """Names in "[ONNX Layer: /blocks.0/MatMul]\\x1e[ONNX Layer: /blocks.0/Add]"."""
    return re.findall(r"\[ONNX Layer: ([^\]]+)\]", metadata or "")


def compare(network: Iterable[MatMul], engine: Sequence[MatMul]) -> str:
    """Which products an engine computes in a wider precision than its network; "" if none.

    Nodes that the inspector does not list (fused ones, say) count as right, but an engine of which it lists none of the
    products is refused.
    """
    expected = [product for product in network if product.precision != "fp32"]
    if not expected:
        return ""
    narrowest: dict[str, int] = {}
    for product in engine:
        width = WIDTHS.get(product.precision, 4)
        narrowest[product.name] = min(width, narrowest.get(product.name, width))
    if not any(product.name in narrowest for product in expected):
        return "the engine inspector tells nothing of its matrix products, so their precision is not known"
    wide = [p for p in expected if narrowest.get(p.name, 0) > WIDTHS.get(p.precision, 4)]
    if not wide:
        return ""
    names = ", ".join(f"{product.name} ({product.precision})" for product in wide[:MAX_NAMES])
    more = f" and {len(wide) - MAX_NAMES} more" if len(wide) > MAX_NAMES else ""
    return f"the engine fell back: {names}{more} computed wider than the graph asks for"
