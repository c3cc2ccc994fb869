"""How fast this machine multiplies matrices, by device and precision: the reference for an engine's arithmetic."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from far_runtime.bench.engine_specs import CPU, GPU
from far_runtime.errors import FarError

SIZE = 2048
ATTEMPTS = 3
"""Products per round. The fastest one counts, since other programs on the machine can only slow a product down."""

MatMul = Callable[[], object]
"""Multiplies two fixed matrices."""

DevicePrecision = tuple[str, str]


@dataclass
class MatmulRate:
    """Multiplies [size, size] matrices by every method that is installed, as the target of a `Worker`.

    The methods are NumPy (FP32), OpenVINO (FP32, BF16, INT8) and those of the plugins, such as torch. Which one is the
    fastest differs by machine and precision.
    """

    targets: tuple[DevicePrecision, ...]
    """What to measure."""

    plugins: Mapping[str, str] = field(default_factory=dict)
    """Modules by engine name, each with a function `matrix_product` that has the arguments of `openvino_product`."""

    threads: int | None = None
    """Threads of a product; None: each method's own choice."""

    size: int = SIZE
    """Rows and columns of the matrices."""

    _methods: dict[DevicePrecision, dict[str, MatMul]] = field(default_factory=dict, init=False)

    def open(self) -> dict[DevicePrecision, list[str]]:
        """Prepare and warm up every method; their names by target, an empty list where there is none."""
        factories = {"numpy": numpy_product, "openvino": openvino_product, **self._plugin_factories()}
        for target in self.targets:
            self._methods[target] = {}
            for name, factory in factories.items():
                # A method that is not installed, or that this machine cannot run, is left out.
                with contextlib.suppress(ImportError, RuntimeError, FarError):
                    product = factory(*target, self.size, self.threads)
                    if product is not None:
                        product()
                        self._methods[target][name] = product
        return {target: list(methods) for target, methods in self._methods.items()}

    def measure(self) -> dict[DevicePrecision, dict[str, float]]:
        """Operations per second by target and method; a multiply-add is two operations."""
        return {
            target: {name: 2.0 * self.size**3 / min(seconds_of(product)) for name, product in methods.items()}
            for target, methods in self._methods.items()
        }

    def _plugin_factories(self) -> dict[str, Callable[..., MatMul | None]]:
        factories = {}
        for name, module in self.plugins.items():
            with contextlib.suppress(ImportError):
                factories[name] = importlib.import_module(module).matrix_product
        return factories


def seconds_of(product: MatMul, attempts: int = ATTEMPTS) -> Iterator[float]:
    """Seconds of each of `attempts` products."""
    for _ in range(attempts):
        started = time.perf_counter()
        product()
        yield time.perf_counter() - started


def _matrices(size: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((size, size), np.float32) for _ in range(2))
    return a, b


def numpy_product(device: str, precision: str, size: int, threads: int | None) -> MatMul | None:
    """NumPy's product, in FP32 on the CPU only; its threads are set by the environment of the process."""
    if (device, precision) != (CPU, "fp32"):
        return None
    a, b = _matrices(size)
    out = np.empty_like(a)
    return lambda: np.matmul(a, b, out=out)


def openvino_product(device: str, precision: str, size: int, threads: int | None) -> MatMul | None:
    """OpenVINO's product of two [size, size] matrices; None for a precision that it does not have.

    The second matrix is a constant, as weights are. INT8 is reached by fake quantisation of both.
    """
    hints = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
    if device == GPU:
        hints["fp16"] = "f16"
    if precision not in hints:
        return None
    ov: Any = importlib.import_module("openvino")
    ops: Any = importlib.import_module("openvino.opset13")
    a, b = _matrices(size)
    parameter = ops.parameter([size, size], np.float32)
    left, right = parameter, ops.constant(b)
    if precision == "int8":
        low, high = np.float32(-5.12), np.float32(5.08)
        left, right = (ops.fake_quantize(matrix, low, high, low, high, 256) for matrix in (left, right))
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hints[precision], "PERFORMANCE_HINT": "LATENCY"}
    if threads and device == CPU:
        settings["INFERENCE_NUM_THREADS"] = threads
    model = ov.Model([ops.matmul(left, right, False, False)], [parameter], "product")
    request = ov.Core().compile_model(model, device.upper(), settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(a))
    return lambda: request.infer()
