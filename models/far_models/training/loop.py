"""The training loop: devices, learning rate, EMA, checkpoints that resume exactly, metrics."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from far_models.training.chance import Chance, step_seed
from far_models.training.ema import EMA
from far_models.training.metrics import MetricsLog
from far_models.training.plan import GUESS_STEPS, device_name, hours_line, measured_cost, plan_lines, speed
from far_models.training.progress import Shown
from far_models.training.state import STATE, load_state, save_state
from far_runtime.errors import FarError


@dataclass(frozen=True)
class LoopSettings:
    """How to train.

    The run ends after `steps` or `epochs`, or after `minutes` of training (kept across resumes), whichever comes first;
    a cosine schedule reaches zero at that end. `batch` counts the pictures of all devices and of the `accumulate`
    micro-batches of a step together. `blr`: the rate per 256 pictures of a batch, in place of `lr`. `warmup_epochs`: in
    place of `warmup`. `checkpointing`: compute blocks again in the backward pass.
    """

    run: Path
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    batch: int = 32
    accumulate: int = 1
    checkpointing: bool = False
    lr: float = 1e-4
    blr: float | None = None
    warmup: int = 100
    warmup_epochs: float | None = None
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

    def settled(self, epoch_length: int) -> LoopSettings:
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
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * self.progress(step, seconds)))


@dataclass(frozen=True)
class Task:
    """What is trained.

    `losses`: a module around `model` whose forward(*batch) returns scalar tensors by name, "loss" among them.
    `fetch(chance, done)`: the samples at the places of `chance`, at a share `done` of the run. `args`: plain values
    that rebuild the model.
    `report(ema model, step, folder)`: writes a sample sheet, returns numbers for the metrics.
    `finish(ema model, folder, summary)`: writes the trained model.
    `no_decay`: parts of parameter names. `unused`: some parameters get no gradient. `kept`: buffers of `losses` that a
    resume needs. `metadata`: what a checkpoint says of the model beside its tensors (see zoo.metadata_of).
    """

    system: str
    model: nn.Module
    losses: nn.Module
    fetch: Callable[[Chance, float], tuple[Tensor, ...]]
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

    What is random of a sample comes from (run seed, step, its place in the batch), so that a resumed run repeats a
    straight one bit for bit, and several processes or micro-batches see what one sees; dropout inside the network
    alone is each process's own. SIGTERM and Ctrl-C end the run after the step, with its state saved. Raises FarError
    where RUN already holds another run and resume is off.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    settings = settings.settled(task.epoch_length)
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=task.unused)])
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    if settings.batch % (world * settings.accumulate):
        raise FarError(
            f"--batch {settings.batch} cannot be shared by {world} processes x --accumulate {settings.accumulate}; "
            f"give a multiple of {world * settings.accumulate}"
        )
    ema = EMA(task.model, settings.ema, settings.ema_ramped)
    ema.model.to(device)
    if settings.checkpointing:
        recompute_blocks(task.model)
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
    places = np.arange(settings.batch)[rank::world]

    def batch_of(step: int, part: int = 0) -> tuple[Tensor, ...]:
        chance = Chance(settings.seed, step, places[part :: settings.accumulate].tolist())
        return tuple(each.to(device) for each in task.fetch(chance, settings.progress(step, seconds)))

    log = MetricsLog(settings.run, step) if accelerator.is_main_process else None
    with Shown(say, accelerator.is_main_process) as shown, Ending() as ending:
        first = batch_of(step)
        torch.manual_seed(step_seed(settings.seed, step, rank))
        probe = copy.deepcopy(task.losses)  # its weights may change
        half = state["amp"] if state is not None else choose_amp(settings.amp, probe, first, device.type, shown.say)
        cost = measured_cost(probe, first, half)
        del probe, first
        for line in plan_lines(task, settings, cost, world, half, device_name(device)):
            shown.say(line)
        if state is not None:
            shown.say(f"resumed {settings.run} at step {step}, {seconds / 60:.1f} minutes into training")

        def save() -> None:
            if accelerator.is_main_process:
                save_state(settings, task, ema, optimizer.state_dict(), step, seconds, half)

        def report() -> None:
            if log is not None:
                log.add(step, seconds, task.report(ema.model, step, settings.run))
                log.draw()

        saved = sheeted = time.monotonic()
        window: list[dict[str, Tensor]] = []
        latest: dict[str, float] = {}
        begun, begun_at, logged, logged_at = step, seconds, step, seconds
        while settings.progress(step, seconds) < 1 and not ending.asked(world, device):
            started = time.monotonic()
            rate = settings.rate(step, seconds)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(step_seed(settings.seed, step, rank))  # dropout
            for part in range(settings.accumulate):
                batch = batch_of(step, part)
                last = part == settings.accumulate - 1
                with nullcontext() if last else accelerator.no_sync(losses):
                    with torch.autocast(device.type, torch.bfloat16, enabled=half):
                        values = losses(*batch)
                    accelerator.backward(values["loss"] / settings.accumulate)
                window.append({name: value.detach() for name, value in values.items()})
            norm = accelerator.clip_grad_norm_(task.losses.parameters(), settings.clip or math.inf)
            window[-1]["gradient"] = norm
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(task.model, step)
            step += 1
            seconds = agreed(seconds + time.monotonic() - started, world, device)
            if step == begun + GUESS_STEPS:
                shown.say(hours_line(settings, step, GUESS_STEPS, seconds - begun_at))
            if step % settings.log_steps == 0:
                latest = averages(window, world) | {"rate": rate, "step_seconds": seconds / step}
                latest |= speed(settings, cost, world, (seconds - logged_at) / (step - logged))
                window, logged, logged_at = [], step, seconds
                if not math.isfinite(latest["loss"]):
                    raise FarError(
                        f"the loss became {latest['loss']} at step {step}; lower --lr, or resume from an earlier "
                        f"{STATE}"
                    )
                if log is not None:
                    log.add(step, seconds, latest)
                    epoch = step * settings.batch / task.epoch_length
                    shown.log(step, epoch, seconds / 60, settings.progress(step, seconds), latest)
            now = time.monotonic()
            if now - saved > 60 * settings.save_minutes:
                save()
                saved = now
            if now - sheeted > 60 * settings.sheet_minutes:
                report()
                sheeted = now
        save()
        summary = {"steps": step, "minutes": round(seconds / 60, 1), **latest}
        if settings.progress(step, seconds) < 1:
            shown.say(f"ended at step {step}, the state is saved; go on with the same command and --resume")
        else:
            report()
            if accelerator.is_main_process:
                task.finish(ema.model, settings.run, summary)
            shown.say(f"done: {step} steps in {seconds / 60:.1f} minutes; {settings.run / STATE}")
            for sheet in sorted((settings.run / "sheets").glob(f"*-{step:06d}.png")):
                shown.say(f"sheet: {sheet}")
    accelerator.end_training()
    return {**summary, "epochs": step * settings.batch / task.epoch_length, "minutes": seconds / 60}


def recompute_blocks(model: nn.Module) -> None:
    """Compute what is inside every transformer block once more in the backward pass, rather than keep it (the official
    code's --grad_checkpointing)."""
    from torch.utils.checkpoint import checkpoint

    for name, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and name.endswith("blocks"):
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class Ending:
    """Whether the run was asked to end, by SIGTERM or Ctrl-C; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Ending:
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
