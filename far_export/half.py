"""FP16 arithmetic as a GPU does it, on any processor: products and convolutions add up in float32 and round once.

ONNX Runtime's CPU provider computes FP16 graphs in float32 and rounds hardly anything, so that what it says of a
graph's precision is too good; torch's own half products are exact enough but slow without hardware for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from far_export.stages.stage import Stage
from far_export.torch_engine import TorchEngine
from far_runtime.engines.base import Array

PRODUCTS = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "conv2d", "convolution", "_convolution")


class WideProducts(TorchDispatchMode):
    """Inside of it, products and convolutions of half tensors are computed in float32 and rounded to half."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        half = any(isinstance(value, torch.Tensor) and value.dtype == torch.float16 for value in args)
        if not half or func.overloadpacket.__name__ not in PRODUCTS:
            return func(*args, **kwargs)
        wide = [v.float() if isinstance(v, torch.Tensor) and v.dtype == torch.float16 else v for v in args]
        return func(*wide, **kwargs).half()


class HalfEngine:
    """Stages whose modules were cast to FP16, run in that arithmetic: an `Engine` for verify."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._torch = TorchEngine(stages)
        self.name = f"{self._torch.name}:fp16"
        self.version = self._torch.version
        self.put, self.get, self.close = self._torch.put, self._torch.get, self._torch.close

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        with WideProducts():
            return self._torch.run(stage, inputs, constants)
