"""FP16 and BF16: the torch modules of stages are cast before they are exported, except for their FP32 islands.

Weights, matrix products and convolutions get 16 bits. A name in `Stage.fp32_islands` is one of these:

- a part of a submodule's name ("norm" for norm1 and encoder_norm): the submodule keeps float32 weights and computes in
  float32, and its output is cast back; a parameter or buffer with such a name keeps float32;
- the name of lines of a network that begin with `far_models.islands.island(name)` and compute in float32;
- the stage's own name: the whole stage stays FP32.

Inputs and outputs of stages stay float32, VAR's keys and values too, so that loops and engines are the same at every
precision. `far_export/onnx/graph_precision.py` proves the outcome on the ONNX graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from far_export.stages.stage import DTYPES, Stage
from far_export.tolerances import stage_tolerance
from far_runtime.errors import CheckFailed

CAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def cast_stages(stages: Sequence[Stage], precision: str) -> list[Stage]:
    """The stages at `precision` ("fp16" or "bf16"). Their modules are cast in place, which saves a second copy of the
    weights; the float32 modules come back by loading the checkpoint again.

    Modules and tensors that several stages share are cast once, and stay FP32 where any of the stages says so.
    """
    dtype = CAST_DTYPES[precision]
    lowered = [stage for stage in stages if not stays_fp32(stage)]
    fp32_parts = {id(part) for stage in stages if stays_fp32(stage) for part in _parts(stage.module)}
    kept = {id(part) for stage in lowered for _, part in island_parts(stage)}
    hooked: set[int] = set()
    for stage in lowered:
        outermost: tuple[str, ...] = ()
        for name, module in stage.module.named_modules():
            if id(module) in fp32_parts or (outermost and name.startswith(outermost)):
                continue
            if id(module) in kept:
                outermost += (f"{name}.",)
                if id(module) not in hooked:
                    hooked.add(id(module))
                    _compute_in_float32(module, dtype)
                continue
            for tensor_name, tensor in _direct_tensors(module):
                if tensor.is_floating_point() and id(tensor) not in kept | fp32_parts:
                    _cast_tensor(module, tensor_name, tensor, dtype)
        _cast_outputs(stage)
    return [
        stage if stays_fp32(stage) else replace(stage, precision=precision, tolerance=stage_tolerance(stage, precision))
        for stage in stages
    ]


def stays_fp32(stage: Stage) -> bool:
    """Whether the whole stage stays FP32 at every precision."""
    return stage.stage in stage.fp32_islands


def island_parts(stage: Stage) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Submodules, parameters and buffers of a stage that are islands, each with the island's name."""
    for path, module in stage.module.named_modules():
        for part, value in ((path.rpartition(".")[2], module), *_direct_tensors(module)):
            for name in stage.fp32_islands:
                if name in part:
                    yield name, value


def island_paths(stage: Stage) -> list[str]:
    """Paths in the stage's module of its islands that are submodules, parameters or buffers."""
    paths = []
    for path, module in stage.module.named_modules():
        prefix = f"{path}." if path else ""
        names = [(path, path.rpartition(".")[2]), *((prefix + name, name) for name, _ in _direct_tensors(module))]
        paths += [part for part, name in names if any(island in name for island in stage.fp32_islands)]
    return paths


def check_islands(stage: Stage, passed: set[str]) -> None:
    """CheckFailed unless the islands that the stage declares are those that its module has.

    passed: names of the lines that a run of the module has computed as islands.
    """
    if stays_fp32(stage):
        return
    present = passed | {name for name, _ in island_parts(stage)}
    missing = [name for name in stage.fp32_islands if name not in present]
    if missing:
        raise CheckFailed(
            f"stage {stage.name}: FP32 island {missing[0]!r} matches no part of its module and no line that it runs; "
            "take it out of the Stage's fp32_islands, or give it the name of what is to stay FP32"
        )
    undeclared = sorted(passed - set(stage.fp32_islands))
    if undeclared:
        raise CheckFailed(f"stage {stage.name}: computes {undeclared[0]!r} in FP32, which its fp32_islands do not name")


def _parts(module: nn.Module) -> Iterator[nn.Module | Tensor]:
    """A module's submodules, parameters and buffers, and the module itself."""
    for _, part in module.named_modules():
        yield part
        yield from (tensor for _, tensor in _direct_tensors(part))


def _direct_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module without those of its submodules."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _cast_tensor(module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if isinstance(tensor, nn.Parameter):
        # The parameter stays the same object, so that modules that share it see the change.
        tensor.data = tensor.data.to(dtype)
    else:
        setattr(module, name, tensor.to(dtype))


def _compute_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    def to_float32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    module.register_forward_pre_hook(to_float32)
    module.register_forward_hook(lambda _, inputs, output: output.to(dtype))


def _cast_outputs(stage: Stage) -> None:
    dtypes = [DTYPES[spec.dtype] for spec in stage.outputs]

    def to_declared(_: nn.Module, inputs: Any, outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            return outputs.to(dtypes[0])
        return tuple(output.to(dtype) for output, dtype in zip(outputs, dtypes, strict=True))

    stage.module.register_forward_hook(to_declared)
