"""The training loop: devices, learning rate, EMA, checkpoints that resume exactly, metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far_models.training.ema import EMA
from far_models.training.metrics import MetricsLog
from far_models.training.state import STATE, load_state, save_state
from far_runtime.errors import FarError


@dataclass(frozen=True)
class LoopSettings:
    """How to train.

    The run ends after `steps`, or after `minutes` of training (kept across resumes), whichever comes first; a cosine
    schedule reaches zero at that end. `batch` counts the pictures of all devices together.
    """

    run: Path
    steps: int | None = None
    minutes: float | None = None
    batch: int = 32
    lr: float = 1e-4
    warmup: int = 100
    schedule: str = "constant"
    weight_decay: float = 0.02
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
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))


@dataclass(frozen=True)
class Task:
    """What is trained.

    `losses`: a module around `model` whose forward(*batch) returns scalar tensors by name, "loss" among them.
    `fetch(step, rank, world, done)`: the batch of this process, at a share `done` of the run. `args`: plain values that
    rebuild the model.
    `report(ema model, step, folder)`: writes a sample sheet, returns numbers for the metrics.
    `finish(ema model, folder, summary)`: writes the trained model.
    `no_decay`: parts of parameter names. `unused`: some parameters get no gradient. `kept`: buffers of `losses` that a
    resume needs. `metadata`: what a checkpoint says of the model beside its tensors (see zoo.metadata_of).
    """

    system: str
    model: nn.Module
    losses: nn.Module
    fetch: Callable[[int, int, int, float], tuple[Tensor, ...]]
    epoch_length: int
    args: dict[str, Any]
    report: Callable[[nn.Module, int, Path], dict[str, float]]
    finish: Callable[[nn.Module, Path, dict[str, Any]], None]
    no_decay: Sequence[str] = ()
    unused: bool = False
    kept: Sequence[str] = ()
    metadata: dict[str, str] = field(default_factory=dict)


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


def train(task: Task, settings: LoopSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the loop to its end; returns a summary {step, epoch, minutes, ...last metrics}.

    All randomness of a step comes from a seed made of (run seed, step, process), so a resumed run repeats a straight
    one bit for bit. Raises FarError where RUN already holds another run and resume is off.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    if not settings.steps and not settings.minutes:
        raise FarError("the run has no end; give --steps or --minutes")
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=task.unused)])
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    if not accelerator.is_main_process:
        say = silence
    if settings.batch % world:
        raise FarError(f"--batch {settings.batch} cannot be shared by {world} processes; give a multiple of {world}")
    ema = EMA(task.model, settings.ema, settings.ema_ramped)
    ema.model.to(device)
    groups = parameter_groups(task.model, settings.weight_decay, task.no_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)
    state = load_state(settings, task)
    losses, optimizer = accelerator.prepare(task.losses, optimizer)
    step, seconds = 0, 0.0
    if state is not None:
        task.model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["model_ema"])
        optimizer.load_state_dict(state["optimizer"])
        for name, value in state.get("losses", {}).items():
            task.losses.get_buffer(name).copy_(value)
        step, seconds = state["step"], state["elapsed"]
        say(f"resumed {settings.run} at step {step}, {seconds / 60:.1f} minutes into training")
    log = MetricsLog(settings.run, step) if accelerator.is_main_process else None

    def save() -> None:
        if accelerator.is_main_process:
            save_state(settings, task, ema, optimizer.state_dict(), step, seconds, half)

    def report() -> None:
        if log is not None:
            log.add(step, seconds, task.report(ema.model, step, settings.run))
            log.draw()

    def batch_of(step: int) -> tuple[Tensor, ...]:
        torch.manual_seed(step_seed(settings.seed, step, rank))
        return tuple(part.to(device) for part in task.fetch(step, rank, world, settings.progress(step, seconds)))

    half = state["amp"] if state is not None else choose_amp(settings.amp, losses, batch_of(step), device.type, say)
    saved = sheeted = time.monotonic()
    window: list[dict[str, Tensor]] = []
    latest: dict[str, float] = {}
    while settings.progress(step, seconds) < 1:
        started = time.monotonic()
        rate = settings.rate(step, seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch_of(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            values = losses(*batch)
        accelerator.backward(values["loss"])
        norm = accelerator.clip_grad_norm_(task.losses.parameters(), settings.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(task.model, step)
        step += 1
        window.append({name: value.detach() for name, value in values.items()} | {"gradient": norm})
        seconds = agreed(seconds + time.monotonic() - started, world, device)
        if step % settings.log_steps == 0:
            latest = averages(window) | {"rate": rate, "step_seconds": seconds / step}
            window = []
            if not math.isfinite(latest["loss"]):
                raise FarError(
                    f"the loss became {latest['loss']} at step {step}; lower --lr, or resume from an earlier {STATE}"
                )
            if log is not None:
                log.add(step, seconds, latest)
                epoch = step * settings.batch / task.epoch_length
                say(
                    f"step {step} epoch {epoch:.1f} {seconds / 60:.1f} min "
                    + " ".join(f"{k} {v:.4g}" for k, v in latest.items())
                )
        now = time.monotonic()
        if now - saved > 60 * settings.save_minutes:
            save()
            saved = now
        if now - sheeted > 60 * settings.sheet_minutes:
            report()
            sheeted = now
    save()
    report()
    if accelerator.is_main_process:
        task.finish(ema.model, settings.run, {"steps": step, "minutes": round(seconds / 60, 1), **latest})
    accelerator.end_training()
    say(f"done: {step} steps in {seconds / 60:.1f} minutes")
    return {"steps": step, "epochs": step * settings.batch / task.epoch_length, "minutes": seconds / 60, **latest}


def silence(line: str) -> None:
    """What the processes other than the main one say."""


def agreed(seconds: float, world: int, device: torch.device) -> float:
    """The main process's clock, for all: the learning rate and the end of the run must be the same everywhere."""
    if world == 1:
        return seconds
    from accelerate.utils import broadcast

    told: Tensor = broadcast(torch.tensor([seconds], dtype=torch.float64, device=device))
    return float(told)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of everything random in one step on one process."""
    import numpy as np

    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def averages(window: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of every named value over some steps."""
    return {name: float(torch.stack([values[name].float() for values in window]).mean()) for name in window[0]}


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
