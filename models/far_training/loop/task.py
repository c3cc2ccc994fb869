"""What a trainer gives to the loop: how to train, and what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from far_runtime.errors import FarError
from far_training.loop.randomness import SampleRng

HELD = 0.05
"""Share of the run after the warm-up for which the linear schedule keeps its rate (VAR's lin0)."""


@dataclass(frozen=True)
class LoopSettings:
    """How to train.

    The run ends after `steps` or `epochs`, or after `minutes` of training (kept across resumes), whichever comes first;
    a falling schedule reaches its end then. `batch` counts the pictures of all devices and of the `accumulate`
    micro-batches of a step together. `blr`: the rate per 256 pictures of a batch, in place of `lr`. `warmup_epochs`: in
    place of `warmup`. `lr_end`: share of the rate that is left at the end, unless the schedule is constant.
    `weight_decay_end`: what the weight decay becomes by the end, along a cosine. `checkpointing`: compute blocks again
    in the backward pass. `shard`: split weights, average and optimizer over the processes.
    """

    run: Path
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch: int = 32
    accumulate: int = 1
    checkpointing: bool = False
    shard: bool = False
    lr: float = 1e-4
    blr: float | None = None
    warmup: int = 100
    warmup_epochs: float | None = None
    schedule: str = "constant"
    lr_end: float = 0.0
    weight_decay: float = 0.02
    weight_decay_end: float | None = None
    beta2: float = 0.95
    clip: float = 3.0
    ema: float = 0.9999
    ema_ramped: bool = True
    amp: str = "off"
    seed: int = 0
    log_steps: int = 20
    save_minutes: float = 2.0
    sheet_minutes: float = 8.0
    resume: bool = False

    def resolved(self, epoch_length: int) -> LoopSettings:
        """The same in steps, for an epoch of so many pictures; FarError where the run has no end."""
        if not self.steps and not self.epochs and not self.minutes:
            raise FarError("the run has no end; give --steps, --epochs or --minutes")
        epoch = epoch_length / self.batch
        steps = [count for count in (self.steps, math.ceil(self.epochs * epoch) if self.epochs else None) if count]
        return replace(
            self,
            steps=min(steps) if steps else None,
            epochs=None,
            lr=self.lr if self.blr is None else self.blr * self.batch / 256,
            blr=None,
            warmup=self.warmup if self.warmup_epochs is None else round(self.warmup_epochs * epoch),
            warmup_epochs=None,
        )

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done, from 0 to 1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def rate(self, step: int, seconds: float) -> float:
        """Learning rate of step `step` (from 0), `seconds` of training into the run."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        done = self.progress(step, seconds)
        if self.schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * done))
        else:
            warmed = self.warmup / self.steps if self.steps else 0.0
            held = warmed + HELD * (1 - warmed)
            left = min(1.0, (1 - done) / (1 - held))
        return self.lr * warm * (self.lr_end + (1 - self.lr_end) * left)

    def decay(self, step: int, seconds: float) -> float:
        """Weight decay of step `step` (from 0)."""
        if self.weight_decay_end is None:
            return self.weight_decay
        left = 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))
        return self.weight_decay_end + (self.weight_decay - self.weight_decay_end) * left


@dataclass(frozen=True)
class Task:
    """What is trained.

    `losses`: a module around `model` whose forward(*batch) returns scalar tensors by name, "loss" among them.
    `fetch(chance, done)`: the samples at the places of `chance`, at a share `done` of the run. `args`: plain values
    that rebuild the model.
    `report(ema model, step, folder)`: writes a sample sheet, returns numbers for the metrics.
    `finish(ema model, folder, summary)`: writes the trained model.
    `no_decay`: parts of parameter names. `unused`: some parameters get no gradient. `kept`: buffers of `losses` that a
    resume needs. `metadata`: what a checkpoint says of the model beside its tensors (see zoo.metadata_of). `beside`: a
    part of `losses` that is trained along with the model and left behind at the end (a discriminator).
    """

    system: str
    model: nn.Module
    losses: nn.Module
    fetch: Callable[[SampleRng, float], tuple[Tensor, ...]]
    epoch_length: int
    args: dict[str, Any]
    report: Callable[[nn.Module, int, Path], dict[str, float]]
    finish: Callable[[nn.Module, Path, dict[str, Any]], None]
    no_decay: Sequence[str] = ()
    unused: bool = False
    kept: Sequence[str] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    beside: nn.Module | None = None
