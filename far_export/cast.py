"""FP16 and BF16: the torch modules of stages cast before they are exported, but for their FP32 islands.

Weights, matrix products and convolutions get 16 bits. An island is declared by its name in `Stage.fp32_islands`:

- a submodule whose name contains it ("norm": norm1, encoder_norm) keeps float32 weights and computes in float32, and
  what it returns is cast back; a parameter or buffer whose name contains it keeps float32;
- the lines of a network that begin with `far_models.islands.island(name)` compute in float32 by themselves;
- the stage's own name: the whole stage stays FP32.

Inputs and outputs of stages stay float32, so that loops and engines are the same at every precision; VAR's keys and
values travel in float32 too. `far_export/onnx/graph_precision.py` proves the outcome on the ONNX graph.
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

CASTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def cast_stages(stages: Sequence[Stage], precision: str) -> list[Stage]:
    """The stages at `precision` ("fp16" or "bf16"), their modules cast in place, so that no second copy of the weights
    is needed. Who needs the float32 modules later loads the checkpoint again.

    Modules and tensors that several stages share are cast once, and stay FP32 where any of the stages says so.
    """
    dtype = CASTS[precision]
    lowered = [stage for stage in stages if not whole(stage)]
    untouched = {id(part) for stage in stages if whole(stage) for part in _all_parts(stage.module)}
    kept = {id(part) for stage in lowered for _, part in island_parts(stage)}
    hooked: set[int] = set()
    for stage in lowered:
        outermost: tuple[str, ...] = ()
        for name, module in stage.module.named_modules():
            if id(module) in untouched or (outermost and name.startswith(outermost)):
                continue
            if id(module) in kept:
                outermost += (f"{name}.",)
                if id(module) not in hooked:
                    hooked.add(id(module))
                    _compute_wide(module, dtype)
                continue
            for own, tensor in _own_tensors(module):
                if tensor.is_floating_point() and id(tensor) not in kept | untouched:
                    _replace(module, own, tensor, dtype)
        _outputs_as_declared(stage)
    return [
        stage if whole(stage) else replace(stage, precision=precision, tolerance=stage_tolerance(stage, precision))
        for stage in stages
    ]


def whole(stage: Stage) -> bool:
    """Whether the whole stage stays FP32 at every precision."""
    return stage.stage in stage.fp32_islands


def island_parts(stage: Stage) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Submodules, parameters and buffers of a stage that are islands, each with the island's name."""
    for path, module in stage.module.named_modules():
        for part, value in ((path.rpartition(".")[2], module), *_own_tensors(module)):
            for name in stage.fp32_islands:
                if name in part:
                    yield name, value


def island_paths(stage: Stage) -> list[str]:
    """Paths in the stage's module of its islands that are submodules, parameters or buffers."""
    paths = []
    for path, module in stage.module.named_modules():
        prefix = f"{path}." if path else ""
        found = [path] if any(name in path.rpartition(".")[2] for name in stage.fp32_islands) else []
        own = (name for name, _ in _own_tensors(module))
        paths += found + [prefix + name for name in own if any(island in name for island in stage.fp32_islands)]
    return paths


def check_islands(stage: Stage, passed: set[str]) -> None:
    """CheckFailed unless what the stage declares is what its module has: every declared island is a part of it or
    among `passed`, those that a run of it came past, and every one of those is declared."""
    if whole(stage):
        return
    found = passed | {name for name, _ in island_parts(stage)}
    missing = [name for name in stage.fp32_islands if name not in found]
    if missing:
        raise CheckFailed(
            f"stage {stage.name}: FP32 island {missing[0]!r} matches no part of its module and no line that it runs; "
            "take it out of the Stage's fp32_islands, or give it the name of what is to stay FP32"
        )
    undeclared = sorted(passed - set(stage.fp32_islands))
    if undeclared:
        raise CheckFailed(f"stage {stage.name}: computes {undeclared[0]!r} in FP32, which its fp32_islands do not name")


def _all_parts(module: nn.Module) -> Iterator[nn.Module | Tensor]:
    """A module with everything in it."""
    for _, part in module.named_modules():
        yield part
        yield from (tensor for _, tensor in _own_tensors(part))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _replace(module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if isinstance(tensor, nn.Parameter):
        tensor.data = tensor.data.to(dtype)  # the same object: modules that share it see the change
    else:
        setattr(module, name, tensor.to(dtype))


def _compute_wide(module: nn.Module, dtype: torch.dtype) -> None:
    def widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(lambda _, inputs, output: output.to(dtype))


def _outputs_as_declared(stage: Stage) -> None:
    dtypes = [DTYPES[spec.dtype] for spec in stage.outputs]

    def declare(_: nn.Module, inputs: Any, outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            return outputs.to(dtypes[0])
        return tuple(output.to(dtype) for output, dtype in zip(outputs, dtypes, strict=True))

    stage.module.register_forward_hook(declare)
