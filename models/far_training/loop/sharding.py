"""How a network is spread over processes: a copy in each (DDP), or split weights (PyTorch's fully_shard, FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from far_runtime.errors import FarError, SettingName
from far_training.loop.processes import ProcessGroup

ACCELERATE_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""accelerate's ways to split weights, which the averaged weights and the training state do not support."""


def check_launcher() -> None:
    """FarError where accelerate is set to split the weights itself."""
    for name in ACCELERATE_SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise FarError(
                f"accelerate's --use_{name.lower()} cannot be used here; launch with --multi_gpu and give far train ",
                SettingName("shard"),
            )


def check_sharding(group: ProcessGroup, forward_writes: bool) -> None:
    """FarError unless the weights can be split: several processes, and no forward pass that writes to weights."""
    if group.world == 1:
        raise FarError(
            SettingName("shard"), ": there is one process alone, nothing to split; start several with accelerate launch"
        )
    if forward_writes:
        raise FarError(
            SettingName("shard"), ": a VQ-VAE moves its codes while it trains; leave ", SettingName("shard"), " out"
        )


def shard(module: nn.Module, group: ProcessGroup) -> None:
    """Split the parameters over the processes; those of a transformer block, and the rest, are gathered for use."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.world,))
    for part in [*transformer_blocks(module), module]:
        fully_shard(part, mesh=mesh)


def transformer_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """All transformer blocks inside a module."""
    for name, blocks in module.named_modules():
        if isinstance(blocks, nn.ModuleList) and name.endswith("blocks"):
            yield from blocks


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether the backward pass adds up the gradients of all processes, as it must for a step's last micro-batch."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
    else:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled)
        yield


def clip_gradients(module: nn.Module, largest: float) -> Tensor:
    """Scale all gradients down to a norm of at most `largest`; the norm [] before."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a split tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any) -> Any:
    """A state dict with its split tensors gathered on the CPU; all processes have to call this."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(gathered, state))
    return state


def load_gathered(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a gathered state dict into a module that may be split."""
    current = module.state_dict()
    module.load_state_dict(
        {name: _split_like(value, current[name]) if name in current else value for name, value in state.items()}
    )


def load_gathered_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a gathered state dict into the optimizer of a module that may be split."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {
        number: {
            name: _split_like(value.clone(), parameters[number]) if value.ndim else value
            for name, value in moments.items()
        }
        for number, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": values})


def _split_like(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
