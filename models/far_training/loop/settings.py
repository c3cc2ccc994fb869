"""How a run trains: its length, its batch, its optimizer, and what it saves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from far_runtime.errors import FarError, SettingName
from far_training.settings import Amount, Count, Decay, Factor, Positive, Share, setting

LINEAR_HOLD = 0.05
"""Share of the run after the warm-up for which the linear schedule keeps its full rate (VAR's lin0)."""


@dataclass(frozen=True)
class LoopSettings:
    """How to train.

    The run ends after `steps` or `epochs`, or after `minutes`, whichever comes first. A cosine or linear schedule
    reaches its end at the same time.
    """

    run: Path = Path("run")
    """Folder for checkpoints, metrics and sample sheets."""
    steps: Positive | None = setting(None, "Stop after this many steps.")
    epochs: Factor | None = setting(None, "Stop after this many passes through the data.")
    minutes: Factor | None = setting(None, "Stop after this many minutes of training, those before a resume included.")
    batch: Positive = setting(32, "Pictures per step, summed over all devices and micro-batches.")
    accumulate: Positive = setting(1, "Micro-batches into which each device splits its part of a step, to save memory.")
    checkpointing: bool = setting(
        False,
        "Compute transformer blocks again in the backward pass instead of storing their activations: less memory, a "
        "third more arithmetic.",
    )
    shard: bool = setting(
        False, "Split weights, averaged weights and optimizer over the processes (PyTorch's FSDP2), to save memory."
    )
    lr: Factor = setting(1e-4, "Learning rate after the warm-up.")
    blr: Factor | None = setting(None, "Learning rate per 256 pictures of --batch, in place of --lr.")
    warmup: Count = setting(100, "Steps over which the learning rate rises.")
    warmup_epochs: Amount | None = setting(None, "Passes over which the learning rate rises, in place of --warmup.")
    schedule: Literal["constant", "cosine", "linear"] = setting(
        "constant", "Course of the learning rate after the warm-up."
    )
    lr_end: Share = setting(0.0, "Share of the learning rate that is left at the end of a cosine or linear schedule.")
    weight_decay: Amount = setting(0.02, "Weight decay; biases, norms and the diffusion head have none.")
    weight_decay_end: Amount | None = setting(
        None, "Weight decay at the end of the run, reached along a cosine; default: it stays the same."
    )
    beta2: Share = setting(0.95, "AdamW's second decay rate.")
    clip: Amount = setting(3.0, "Largest gradient norm; 0: no clipping.")
    ema: Decay = setting(0.9999, "Decay of the averaged weights (EMA).")
    ema_ramped: bool = setting(
        True, "Whether the averaged weights follow faster in the first steps.", "--ema-ramped/--ema-fixed"
    )
    amp: Literal["auto", "on", "off"] = setting(
        "auto", "bfloat16 autocast; auto times a few steps with and without it and takes the faster."
    )
    seed: Count = setting(0, "Seed of everything random.")
    log_steps: Positive = setting(20, "Steps between log lines.")
    save_minutes: Amount = setting(2.0, "Minutes between checkpoints.")
    sheet_minutes: Amount = setting(8.0, "Minutes between sample sheets.")
    resume: bool = setting(False, "Go on with the run in the folder.")

    def resolved(self, epoch_length: int) -> LoopSettings:
        """The same settings in steps, for an epoch of `epoch_length` pictures; FarError where the run has no end."""
        if not self.steps and not self.epochs and not self.minutes:
            raise FarError(
                "the run has no end; give ",
                SettingName("steps"),
                ", ",
                SettingName("epochs"),
                " or ",
                SettingName("minutes"),
            )
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
        """Share of the run that is done after `step` steps and `seconds` of training, from 0 to 1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def learning_rate(self, step: int, seconds: float) -> float:
        """Learning rate of step `step` (from 0), `seconds` of training into the run."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        progress = self.progress(step, seconds)
        if self.schedule == "cosine":
            left = _cosine(progress)
        else:
            warmed = self.warmup / self.steps if self.steps else 0.0
            held = warmed + LINEAR_HOLD * (1 - warmed)
            left = min(1.0, (1 - progress) / (1 - held))
        return self.lr * warm * (self.lr_end + (1 - self.lr_end) * left)

    def decay(self, step: int, seconds: float) -> float:
        """Weight decay of step `step` (from 0), `seconds` of training into the run."""
        if self.weight_decay_end is None:
            return self.weight_decay
        left = _cosine(self.progress(step, seconds))
        return self.weight_decay_end + (self.weight_decay - self.weight_decay_end) * left


def _cosine(progress: float) -> float:
    """Half a cosine that falls from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))
