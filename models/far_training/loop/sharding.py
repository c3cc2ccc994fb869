"""How a network is spread over processes: a copy in each (DDP), or split weights (PyTorch's fully_shard, FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from far_runtime.errors import FarError

SPLITTERS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""accelerate's own ways to split weights, which the average of the weights and the training state do not know."""


def check_launcher() -> None:
    """FarError where accelerate was told to split the weights itself."""
    for kind in SPLITTERS:
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise FarError(
                f"accelerate's --use_{kind.lower()} cannot be used here; launch with --multi_gpu and give far train "
                "--shard"
            )


def check_split(world: int, kept: Sequence[str]) -> None:
    """FarError unless the weights can be split: among several processes, and where no forward pass writes to them."""
    if world == 1:
        raise FarError("--shard: there is one process alone, nothing to split; start several with accelerate launch")
    if kept:
        raise FarError("--shard: a VQ-VAE moves its codes while it trains; leave --shard out")


def split(module: nn.Module, device: torch.device, world: int) -> None:
    """Split the parameters over the processes, each transformer block's and the rest's gathered when they are used."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world,))
    for part in [*transformer_blocks(module), module]:
        fully_shard(part, mesh=mesh)


def transformer_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """All transformer blocks inside."""
    for name, blocks in module.named_modules():
        if isinstance(blocks, nn.ModuleList) and name.endswith("blocks"):
            yield from blocks


@contextmanager
def exchanging(module: nn.Module, now: bool) -> Iterator[None]:
    """Whether the processes add up their gradients in the backward pass; not before a step's last micro-batch."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, DistributedDataParallel) and not now:
        with module.no_sync():
            yield
    else:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(now)
        yield


def clipped_norm(module: nn.Module, most: float) -> Tensor:
    """Norm of all gradients, which are scaled down to `most`."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a split tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: Any) -> Any:
    """A state dict whose split tensors are gathered on the CPU; a step that all processes have to take together."""
    return _mapped(state, lambda tensor: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor)


def fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state dict into a module that may be split."""
    mine = module.state_dict()
    module.load_state_dict({name: _as(value, mine[name]) if name in mine else value for name, value in state.items()})


def fill_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state dict into the optimizer of a module that may be split."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {
        number: {
            name: _as(value.clone(), parameters[number]) if value.ndim else value for name, value in moments.items()
        }
        for number, moments in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": values})


def _as(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: _mapped(value, change) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_mapped(value, change) for value in state)
    return state
