"""Stage: one ONNX graph as declared, by its names, axes, shape profile and tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from far_runtime.bundle import TensorSpec

DTYPES = {"float32": torch.float32, "int64": torch.int64, "uint8": torch.uint8}


@dataclass(frozen=True)
class Input:
    """An input of a stage. A text in the shape names a dynamic axis. Integer inputs state the exclusive bound of
    their values."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    below: int | str = 1

    @property
    def spec(self) -> TensorSpec:
        """As the manifest records it."""
        return TensorSpec(self.name, self.dtype, self.shape)


@dataclass(frozen=True)
class Stage:
    """One graph to be exported: `module` called with the inputs by name.

    stage: the name by which the loop runs it; name: the graph's own (they differ where a stage has a graph per
    level). profile: smallest, usual and largest size of every dynamic axis. tolerance: relative error to the float32
    torch module that is accepted. fp32_islands: what stays FP32 at lower precisions, by name (far_export/cast.py
    says how). precision: of its matrix products. constants: what is folded in. flops: arithmetic of one row, as the
    manifest records it.
    """

    stage: str
    module: nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[TensorSpec, ...]
    profile: Mapping[str, tuple[int, int, int]]
    tolerance: float = 1e-4
    fp32_islands: tuple[str, ...] = ()
    constants: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    suffix: str = ""
    precision: str = "fp32"

    @property
    def name(self) -> str:
        """The graph's name, also that of its file."""
        return self.stage + self.suffix

    def example(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
        """Random inputs with the given size for every dynamic axis; integers stay below their bounds, floats are
        N(0, 1)."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for spec in self.inputs:
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
            if spec.dtype in ("int64", "uint8"):
                bound = sizes[spec.below] if isinstance(spec.below, str) else spec.below
                integers = torch.randint(0, max(bound, 1), shape, generator=generator)
                tensors[spec.name] = integers.to(DTYPES[spec.dtype])
            else:
                tensors[spec.name] = torch.randn(shape, generator=generator, dtype=DTYPES[spec.dtype])
        return tensors
