"""How fast this machine multiplies matrices, by precision: what an engine's arithmetic is held against."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from far_runtime.bench.contenders import CPU, GPU
from far_runtime.errors import FarError

SIZE = 2048
ATTEMPTS = 3
"""Products a round; the fastest counts, since nothing but the machine is to be measured."""

MatMul = Callable[[], object]
Kind = tuple[str, str]
"""Device and precision."""


@dataclass
class MatmulRate:
    """The session of a process that multiplies [size, size] matrices by all methods that there are for each kind.

    NumPy (FP32), OpenVINO (FP32, BF16, INT8) and those that `plugins` add, modules by the name of their engine with a
    function `matrix_product` of the same arguments as the ones here: torch (the same three; on NVIDIA GPUs too). Which
    method is the fastest differs by machine and precision, so all that are installed are tried.
    """

    kinds: tuple[Kind, ...]
    plugins: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    size: int = SIZE
    _ready: dict[Kind, dict[str, MatMul]] = field(default_factory=dict, init=False)

    def open(self) -> dict[Kind, list[str]]:
        """Prepare and warm up; the methods of each kind, an empty list where there is none."""
        makers = {"numpy": _numpy, "openvino": openvino_product, **self._added()}
        for kind in self.kinds:
            self._ready[kind] = {}
            for name, make in makers.items():
                try:
                    product = make(*kind, self.size, self.threads)
                    if product is not None:
                        product()
                        self._ready[kind][name] = product
                except (ImportError, RuntimeError, FarError):  # not installed, or not able to on this machine
                    continue
        return {kind: list(methods) for kind, methods in self._ready.items()}

    def measure(self) -> dict[Kind, dict[str, float]]:
        """Operations a second (a multiply-add is two) of each kind by each method."""
        return {
            kind: {name: 2.0 * self.size**3 / min(seconds_of(product)) for name, product in methods.items()}
            for kind, methods in self._ready.items()
        }

    def _added(self) -> dict[str, Callable[..., MatMul | None]]:
        made = {}
        for name, module in self.plugins.items():
            with contextlib.suppress(ImportError):
                made[name] = importlib.import_module(module).matrix_product
        return made


def seconds_of(product: MatMul, attempts: int = ATTEMPTS) -> Iterable[float]:
    """Seconds of single products."""
    for _ in range(attempts):
        started = time.perf_counter()
        product()
        yield time.perf_counter() - started


def _matrices(size: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((size, size), np.float32) for _ in range(2))
    return a, b


def _numpy(device: str, precision: str, size: int, threads: int | None) -> MatMul | None:
    """Its threads are those of the environment in which the process was started."""
    if (device, precision) != (CPU, "fp32"):
        return None
    a, b = _matrices(size)
    out = np.empty_like(a)
    return lambda: np.matmul(a, b, out=out)


def openvino_product(device: str, precision: str, size: int, threads: int | None) -> MatMul | None:
    """The second factor is a constant, as weights are; INT8 by fake quantisation of both."""
    hints = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
    if device == GPU:
        hints["fp16"] = "f16"
    if precision not in hints:
        return None
    ov: Any = importlib.import_module("openvino")
    ops: Any = importlib.import_module("openvino.opset13")
    a, b = _matrices(size)
    factor = ops.parameter([size, size], np.float32)
    left, right = factor, ops.constant(b)
    if precision == "int8":
        low, high = np.float32(-5.12), np.float32(5.08)
        left, right = (ops.fake_quantize(one, low, high, low, high, 256) for one in (left, right))
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hints[precision], "PERFORMANCE_HINT": "LATENCY"}
    if threads and device == CPU:
        settings["INFERENCE_NUM_THREADS"] = threads
    model = ov.Model([ops.matmul(left, right, False, False)], [factor], "product")
    request = ov.Core().compile_model(model, device.upper(), settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(a))
    return lambda: request.infer()
