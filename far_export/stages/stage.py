"""Stage: one ONNX graph as declared, by its names, axes, shape profile and tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from far_runtime.bundle import TensorSpec

DTYPES = {"float32": torch.float32, "int64": torch.int64, "uint8": torch.uint8}

BATCH, ROWS = (1, 4, 64), (1, 8, 128)
"""Smallest, usual and largest number of pictures, and of rows: a picture has two with guidance."""


@dataclass(frozen=True)
class Input:
    """An input of a stage."""

    name: str
    """The name of the module's parameter and of the graph's input."""

    shape: tuple[int | str, ...]
    """A text names an axis of any length."""

    dtype: str = "float32"
    """ "float32", "int64" or "uint8"."""

    below: int | str = 1
    """Exclusive bound of an integer input's values, or the axis whose length is the bound."""

    @property
    def spec(self) -> TensorSpec:
        """As the manifest records it."""
        return TensorSpec(self.name, self.dtype, self.shape)


@dataclass(frozen=True)
class Stage:
    """One graph to be exported: a torch module that is called with its inputs by name."""

    stage: str
    """The name by which the loop runs it."""

    module: nn.Module
    """Called with the inputs by name; gives a tensor, or a tuple of tensors in the order of the outputs."""

    inputs: tuple[Input, ...]
    """In the order of the graph's inputs."""

    outputs: tuple[TensorSpec, ...]
    """In the order of the graph's outputs."""

    profile: Mapping[str, tuple[int, int, int]]
    """Smallest, usual and largest length of every axis of any length: TensorRT's min, opt and max."""

    tolerance: float = 1e-4
    """Relative error to the float32 torch module that is accepted."""

    fp32_islands: tuple[str, ...] = ()
    """Names of what stays FP32 at lower precisions (far_export/cast.py)."""

    constants: Mapping[str, int] = field(default_factory=dict)
    """Inputs of the loop that are folded into the graph, and their values."""

    flops: Mapping[str, float] = field(default_factory=dict)
    """FLOPs of one row, a polynomial: coefficients by axes, {"": constant, "tokens": linear, "tokens past": ...}."""

    suffix: str = ""
    """What follows the stage's name in the graph's name, where a stage has a graph per level."""

    precision: str = "fp32"
    """Precision of its matrix products."""

    @property
    def name(self) -> str:
        """The graph's name, also that of its file."""
        return self.stage + self.suffix

    def example(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
        """Random inputs with the given length for every axis of any length: floats are N(0, 1), integers stay below
        their bounds."""
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
