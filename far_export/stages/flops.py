"""Arithmetic of a torch function, counted without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> float:
    """Floating-point operations (a multiply-add is two) of the matrix products and convolutions in function(*inputs).

    On meta tensors nothing is computed. A module is counted on a meta copy of its parameters.
    """
    with FlopCounterMode(display=False) as counter:
        if isinstance(function, nn.Module):
            from torch.func import functional_call

            state = {
                name: value.to("meta") for name, value in [*function.named_parameters(), *function.named_buffers()]
            }
            functional_call(function, state, inputs)
        else:
            function(*inputs)
    return float(counter.get_total_flops())
