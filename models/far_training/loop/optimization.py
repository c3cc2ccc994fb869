"""How a step is computed: which parameters decay, whether under autocast, whether blocks are recomputed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from far_training.loop.display import Log
from far_training.loop.sharding import transformer_blocks

TIMED_STEPS = 3


def parameter_groups(model: nn.Module, weight_decay: float, no_decay: Sequence[str]) -> list[dict[str, Any]]:
    """AdamW's groups of parameters: those that decay, then those that do not.

    Vectors (biases, norms) and parameters whose name contains one of `no_decay` do not decay.
    """
    decaying: list[nn.Parameter] = []
    constant: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or name.endswith(".bias") or any(part in name for part in no_decay)
        (constant if spared else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": constant, "weight_decay": 0.0}]


def recompute_blocks(model: nn.Module) -> None:
    """Recompute the inside of every transformer block in the backward pass (the official code's --grad_checkpointing).

    What would be stored of it otherwise takes most of the memory.
    """
    from torch.utils.checkpoint import checkpoint

    for block in transformer_blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def choose_autocast(amp: str, losses: nn.Module, batch: tuple[Tensor, ...], device: str, log: Log) -> bool:
    """Whether to compute under bfloat16 autocast: as `amp` says ("on", "off"), or ("auto") by timing both."""
    if amp != "auto":
        return amp == "on"

    def seconds(autocast: bool) -> float:
        times = []
        for _ in range(TIMED_STEPS):
            started = time.monotonic()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = losses(*batch)["loss"]
            loss.backward()
            loss.item()
            losses.zero_grad(set_to_none=True)
            times.append(time.monotonic() - started)
        return min(times)

    full, half = seconds(False), seconds(True)
    log(f"one step takes {full:.2f} s in float32 and {half:.2f} s under bfloat16 autocast")
    return half < full
