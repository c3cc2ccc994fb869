"""Choices of how to compute: which parameters decay, whether under autocast, whether blocks are computed twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from far_training.loop.sharding import transformer_blocks


def parameter_groups(model: nn.Module, weight_decay: float, no_decay: Sequence[str]) -> list[dict[str, Any]]:
    """AdamW groups: no decay for vectors (biases, norms) and for parameters whose name contains one of `no_decay`."""
    decayed: list[Any] = []
    spared: list[Any] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = parameter.ndim <= 1 or name.endswith(".bias") or any(part in name for part in no_decay)
        (spared if bare else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def recompute_blocks(model: nn.Module) -> None:
    """Compute what is inside every transformer block once more in the backward pass, rather than keep it (the official
    code's --grad_checkpointing)."""
    from torch.utils.checkpoint import checkpoint

    for block in transformer_blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def choose_amp(amp: str, losses: nn.Module, batch: tuple[Tensor, ...], device: str, say: Callable[[str], None]) -> bool:
    """Whether to compute under bfloat16 autocast: "on", "off", or "auto", which times a few steps of both."""
    if amp != "auto":
        return amp == "on"

    def seconds(half: bool) -> float:
        times = []
        for _ in range(3):
            started = time.monotonic()
            with torch.autocast(device, torch.bfloat16, enabled=half):
                loss = losses(*batch)["loss"]
            loss.backward()
            loss.item()
            losses.zero_grad(set_to_none=True)
            times.append(time.monotonic() - started)
        return min(times)

    full, half = seconds(False), seconds(True)
    say(f"one step takes {full:.2f} s in float32 and {half:.2f} s under bfloat16 autocast")
    return half < full
