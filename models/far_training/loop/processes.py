"""What the processes of a run agree on, under `accelerate launch` or torchrun."""

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
    """This process among those of the run."""

    rank: int
    """Number of this process, from 0."""
    world: int
    """Number of processes."""
    wait: Callable[[], None]
    """Waits until all processes have come here."""
    device: torch.device
    """Device of this process."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0


ALONE = ProcessGroup(0, 1, lambda: None, torch.device("cpu"))


def process_group() -> ProcessGroup:
    """The processes that a launcher started, or this one alone."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Accelerator reads this variable, PartialState does not.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    return ProcessGroup(state.process_index, state.num_processes, state.wait_for_everyone, state.device)


class StopSignal:
    """Whether SIGTERM or Ctrl-C asked the run to stop; a second Ctrl-C stops it at once."""

    def __init__(self) -> None:
        self._received = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGTERM, signal.SIGINT)
            self._handlers = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True

    def received(self, group: ProcessGroup) -> bool:
        """Whether any process got the signal; the answer is the same in all of them."""
        if group.world == 1:
            return self._received
        from accelerate.utils import reduce

        count: Tensor = reduce(torch.tensor([float(self._received)], device=group.device), "sum")
        return bool(count)


def from_main_process(value: float, group: ProcessGroup) -> float:
    """The main process's value, for all; clocks differ, but learning rate and end of the run must not."""
    if group.world == 1:
        return value
    from accelerate.utils import broadcast

    shared: Tensor = broadcast(torch.tensor([value], dtype=torch.float64, device=group.device))
    return float(shared)


def mean_values(steps: Sequence[dict[str, Tensor]], group: ProcessGroup) -> dict[str, float]:
    """Mean of every named value [] over some steps and all processes."""
    means = {}
    for name in dict.fromkeys(name for values in steps for name in values):
        mean = torch.stack([values[name].float() for values in steps if name in values]).mean()
        if group.world > 1:
            from accelerate.utils import reduce

            mean = reduce(mean, "mean")
        means[name] = float(mean)
    return means
