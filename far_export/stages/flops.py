"""Arithmetic of a torch function, counted without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from far_models.far import FAR


def count_flops(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> float:
    """Floating-point operations (a multiply-add is two) of the matrix products and convolutions in function(*inputs).

    On meta tensors nothing is computed. A module is counted on a meta copy of its parameters.
    """
    with FlopCounterMode(display=False) as counter:
        if isinstance(function, nn.Module):
            tensors = [*function.named_parameters(), *function.named_buffers()]
            functional_call(function, {name: tensor.to("meta") for name, tensor in tensors}, inputs)
        else:
            function(*inputs)
    return float(counter.get_total_flops())


def flops_by_visible_tokens(flops: Callable[[int], float], tokens: int) -> dict[str, float]:
    """FLOPs of a row as a polynomial in the number of visible tokens, the axis `count`.

    flops: those of a row with so many visible tokens. tokens: of a picture.
    """
    points = (1, tokens // 2, tokens)  # not 0: without any visible token FAR-T2I runs no encoder at all
    values = torch.tensor([flops(n) for n in points], dtype=torch.float64)
    matrix = torch.tensor([[1.0, p, p * p] for p in points], dtype=torch.float64)
    return dict(zip(("", "count", "count count"), torch.linalg.solve(matrix, values).tolist(), strict=True))


def features_flops(far: FAR, visible: int | None) -> float:
    """FLOPs of a row of encoder, decoder and the projection of z. far: on the meta device. visible: number of visible
    tokens, None for a network without a mask."""
    config = far.config
    inputs = [
        torch.empty(1, config.tokens, config.channels, device="meta"),
        torch.empty(1, config.encoder_width, device="meta"),
    ]
    if visible is not None:
        inputs += [torch.empty(1, n, dtype=torch.int64, device="meta") for n in (visible, config.tokens)]
    projection = 2.0 * config.tokens * config.decoder_width * config.head_width
    return count_flops(far.features, tuple(inputs)) + projection
