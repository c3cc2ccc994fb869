"""What several processes agree on, under `accelerate launch` or torchrun."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProcessGroup:
    """This process's number, how many there are, how to wait for all, and its device."""

    rank: int
    world: int
    wait: Callable[[], None]
    device: torch.device


ALONE = ProcessGroup(0, 1, lambda: None, torch.device("cpu"))


def together() -> ProcessGroup:
    """The processes that a launcher started, or this one alone."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # which Accelerator alone would look at
    return ProcessGroup(state.process_index, state.num_processes, state.wait_for_everyone, state.device)


class StopSignal:
    """Whether the run was asked to end, by SIGTERM or Ctrl-C; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *rest: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def asked(self, world: int, device: torch.device) -> bool:
        """The same answer in all processes: if one of them was asked."""
        if world == 1:
            return self._asked
        from accelerate.utils import reduce

        told: Tensor = reduce(torch.tensor([float(self._asked)], device=device), "sum")
        return bool(told)


def agreed(seconds: float, world: int, device: torch.device) -> float:
    """The main process's clock, for all: the learning rate and the end of the run must be the same everywhere."""
    if world == 1:
        return seconds
    from accelerate.utils import broadcast

    told: Tensor = broadcast(torch.tensor([seconds], dtype=torch.float64, device=device))
    return float(told)


def averages(window: Sequence[dict[str, Tensor]], world: int) -> dict[str, float]:
    """Mean of every named value over some steps and all processes."""
    found = {}
    for name in dict.fromkeys(name for values in window for name in values):
        mean = torch.stack([values[name].float() for values in window if name in values]).mean()
        if world > 1:
            from accelerate.utils import reduce

            mean = reduce(mean, "mean")
        found[name] = float(mean)
    return found
