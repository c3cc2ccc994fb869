"""The torch modules as an engine, so that the reference runs the same sampling loop as the engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from far_export.stages.stage import Stage
from far_runtime.bundle import fits
from far_runtime.engines.base import Array
from far_runtime.errors import FarError


class TorchEngine:
    """Runs stages by their torch modules in float32 on a device."""

    def __init__(self, stages: Sequence[Stage], device: str = "cpu") -> None:
        self.name = f"torch:{device}"
        self.version = torch.__version__
        self._device = torch.device(device)
        self._stages = list(stages)
        for stage in self._stages:
            stage.module.to(self._device)

    def put(self, array: NDArray[Any]) -> Array:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def get(self, array: Array) -> NDArray[Any]:
        host: NDArray[Any] = array.cpu().numpy()
        return host

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        constants = constants or {}
        declared = self._stage(stage, constants)
        arrays = {
            spec.name: inputs[spec.name]
            if spec.name in inputs
            else torch.tensor([constants[spec.name]], dtype=torch.int64, device=self._device)
            for spec in declared.inputs
        }
        with torch.inference_mode():
            outputs = declared.module(**arrays)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        return {spec.name: output for spec, output in zip(declared.outputs, outputs, strict=True)}

    def close(self) -> None:
        self._stages.clear()

    def _stage(self, stage: str, constants: Mapping[str, int]) -> Stage:
        for declared in self._stages:
            if declared.stage == stage and fits(declared.constants, constants):
                return declared
        raise FarError(f"the torch engine has no {stage} stage for {dict(constants)}; export with --levels shared")


MATMUL_FUNCTIONS = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "conv2d", "convolution", "_convolution")
"""Names of torch's matrix products and convolutions."""


class Float32MatMuls(TorchDispatchMode):
    """A context in which matrix products and convolutions of half tensors are computed in float32 and rounded to half,
    as a GPU does."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        half = any(isinstance(value, torch.Tensor) and value.dtype == torch.float16 for value in args)
        if not half or func.overloadpacket.__name__ not in MATMUL_FUNCTIONS:
            return func(*args, **kwargs)
        floats = [v.float() if isinstance(v, torch.Tensor) and v.dtype == torch.float16 else v for v in args]
        return func(*floats, **kwargs).half()


class Fp16Engine:
    """Runs stages whose modules were cast to FP16, in the arithmetic of a GPU, for verify."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._torch = TorchEngine(stages)
        self.name = f"{self._torch.name}:fp16"
        self.version = self._torch.version
        self.put, self.get, self.close = self._torch.put, self._torch.get, self._torch.close

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        with Float32MatMuls():
            return self._torch.run(stage, inputs, constants)
