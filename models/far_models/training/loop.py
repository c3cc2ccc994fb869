"""The training loop: devices, learning rate, EMA, checkpoints that resume exactly, metrics."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far_models.training.ahead import Ahead
from far_models.training.chance import Chance, step_seed
from far_models.training.ema import EMA
from far_models.training.metrics import MetricsLog
from far_models.training.optimization import choose_amp, parameter_groups, recompute_blocks
from far_models.training.plan import GUESS_STEPS, Cost, device_name, hours_line, measured_cost, plan_lines, speed
from far_models.training.processes import Ending, agreed, averages
from far_models.training.progress import Shown
from far_models.training.state import STATE, load_state, save_state
from far_runtime.errors import FarError

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")
"""Ways of accelerate that split the weights, which EMA and training state do not know."""


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


def train(task: Task, settings: LoopSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the loop to its end; returns a summary {steps, epochs, minutes, ...last metrics}.

    What is random of a sample comes from (run seed, step, its place in the batch), so that a resumed run repeats a
    straight one bit for bit, and several processes or micro-batches see what one sees; dropout inside the network
    alone is each process's own. SIGTERM and Ctrl-C end the run after the step, with its state saved. Raises FarError
    where RUN already holds another run and resume is off.
    """
    trainer = Trainer(task, settings.settled(task.epoch_length))
    with Shown(say, trainer.main) as shown, Ending() as ending:
        return trainer.run(shown, ending)


class Trainer:
    """A run: network, average, optimizer, and how far it is. settings: settled."""

    def __init__(self, task: Task, settings: LoopSettings) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.task, self.settings = task, settings
        self.accelerator = Accelerator(
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=task.unused)]
        )
        kind = self.accelerator.distributed_type
        if kind in SHARDING:
            raise FarError(
                f"{kind.value}: weights that are split over devices cannot be trained here; "
                "use --multi_gpu (every device holds all weights), --checkpointing and --accumulate"
            )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        if settings.batch % (self.world * settings.accumulate):
            raise FarError(
                f"--batch {settings.batch} cannot be shared by {self.world} processes x --accumulate "
                f"{settings.accumulate}; give a multiple of {self.world * settings.accumulate}"
            )
        self.ema = EMA(task.model, settings.ema, settings.ema_ramped)
        self.ema.model.to(self.device)
        if settings.checkpointing:
            recompute_blocks(task.model)
        groups = parameter_groups(task.model, settings.weight_decay, task.no_decay)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)
        self.state = load_state(settings, task)
        self.losses, self.optimizer = self.accelerator.prepare(task.losses, optimizer)
        self.step, self.seconds = 0, 0.0
        if self.state is not None:
            self._restore(self.state)
        self.log = MetricsLog(settings.run, self.step) if self.main else None

    def _restore(self, state: dict[str, Any]) -> None:
        self.task.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["model_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state.get("losses", {}).items():
            self.task.losses.get_buffer(name).copy_(value)
        self.step, self.seconds = state["step"], state["elapsed"]

    @property
    def done(self) -> float:
        """Share of the run that is done."""
        return self.settings.progress(self.step, self.seconds)

    @property
    def epoch(self) -> float:
        """Passes through the data."""
        return self.step * self.settings.batch / self.task.epoch_length

    def run(self, shown: Shown, ending: Ending) -> dict[str, Any]:
        """Train to the end, or until the run is asked to end."""
        cost, half = self._plan(shown)
        with Ahead(self._fetch) as ahead:
            latest = self._steps(shown, ending, ahead, cost, half)
        self.save(half)
        minutes = self.seconds / 60
        if self.done < 1:
            shown.say(f"ended at step {self.step}, the state is saved; go on with the same command and --resume")
        else:
            self.report()
            if self.main:
                summary = {"steps": self.step, "minutes": round(minutes, 1), **latest}
                self.task.finish(self.ema.model, self.settings.run, summary)
            shown.say(f"done: {self.step} steps in {minutes:.1f} minutes; {self.settings.run / STATE}")
            for sheet in sorted((self.settings.run / "sheets").glob(f"*-{self.step:06d}.png")):
                shown.say(f"sheet: {sheet}")
        self.accelerator.end_training()
        return {"steps": self.step, "epochs": self.epoch, "minutes": minutes, **latest}

    def _plan(self, shown: Shown) -> tuple[Cost, bool]:
        """Tell what the run will cost; its cost, and whether it computes under autocast."""
        settings, state, device = self.settings, self.state, self.device
        probe = copy.deepcopy(self.task.losses)  # its weights may change
        batch = self._fetch(self.step, 0, self.done)
        torch.manual_seed(step_seed(settings.seed, self.step, self.rank))
        half = bool(state["amp"]) if state else choose_amp(settings.amp, probe, batch, device.type, shown.say)
        cost = measured_cost(probe, batch, half)
        for line in plan_lines(self.task, settings, cost, self.world, half, device_name(device)):
            shown.say(line)
        if state is not None:
            shown.say(f"resumed {settings.run} at step {self.step}, {self.seconds / 60:.1f} minutes into training")
        return cost, half

    def _fetch(self, step: int, part: int, done: float) -> tuple[Tensor, ...]:
        """Micro-batch `part` of a step, of this process."""
        places = range(self.rank, self.settings.batch, self.world)[part :: self.settings.accumulate]
        chance = Chance(self.settings.seed, step, places)
        return tuple(each.to(self.device) for each in self.task.fetch(chance, done))

    def _steps(self, shown: Shown, ending: Ending, ahead: Ahead, cost: Cost, half: bool) -> dict[str, float]:
        """All steps, with their logs, states and sheets; what was logged last."""
        settings = self.settings
        saved = sheeted = time.monotonic()
        window: list[dict[str, Tensor]] = []
        latest: dict[str, float] = {}
        begun = logged = (self.step, self.seconds)
        while self.done < 1 and not ending.asked(self.world, self.device):
            window += self._train_step(ahead, half)
            if self.step == begun[0] + GUESS_STEPS:
                shown.say(hours_line(settings, self.step, GUESS_STEPS, self.seconds, begun[1]))
            if self.step % settings.log_steps == 0:
                latest = self._averaged(window)
                latest |= speed(settings, cost, self.world, (self.seconds - logged[1]) / (self.step - logged[0]))
                window, logged = [], (self.step, self.seconds)
                if self.log is not None:
                    self.log.add(self.step, self.seconds, latest)
                    shown.log(self.step, self.epoch, self.seconds / 60, self.done, latest)
            now = time.monotonic()
            if now - saved > 60 * settings.save_minutes:
                self.save(half)
                saved = now
            if now - sheeted > 60 * settings.sheet_minutes:
                self.report()
                sheeted = now
        return latest

    def _train_step(self, ahead: Ahead, half: bool) -> list[dict[str, Tensor]]:
        """One step of the optimizer; what each of its micro-batches measured."""
        settings, started, last = self.settings, time.monotonic(), self.settings.accumulate - 1
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.step, self.seconds)
        torch.manual_seed(step_seed(settings.seed, self.step, self.rank))  # dropout
        measured = []
        for part in range(settings.accumulate):
            step, following = (self.step, part + 1) if part < last else (self.step + 1, 0)
            then = (step, following, settings.progress(step, self.seconds))
            batch = ahead.take((self.step, part, self.done), then)
            with nullcontext() if part == last else self.accelerator.no_sync(self.losses):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                    values = self.losses(*batch)
                self.accelerator.backward(values["loss"] / settings.accumulate)
            measured.append({name: value.detach() for name, value in values.items()})
        norm = self.accelerator.clip_grad_norm_(self.task.losses.parameters(), settings.clip or math.inf)
        measured[-1]["gradient"] = norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.task.model, self.step)
        self.step += 1
        self.seconds = agreed(self.seconds + time.monotonic() - started, self.world, self.device)
        return measured

    def _averaged(self, window: list[dict[str, Tensor]]) -> dict[str, float]:
        """The averages of a window; FarError where the loss is no number any more."""
        rate = self.settings.rate(self.step - 1, self.seconds)
        latest = averages(window, self.world) | {"rate": rate, "step_seconds": self.seconds / self.step}
        if not math.isfinite(latest["loss"]):
            raise FarError(
                f"the loss became {latest['loss']} at step {self.step}; lower --lr, or resume from an earlier {STATE}"
            )
        return latest

    def save(self, half: bool) -> None:
        """Write the state."""
        if self.main:
            optimizer = self.optimizer.state_dict()
            save_state(self.settings, self.task, self.ema, optimizer, self.step, self.seconds, half)

    def report(self) -> None:
        """Draw a sheet and the curves."""
        if self.log is not None:
            self.log.add(self.step, self.seconds, self.task.report(self.ema.model, self.step, self.settings.run))
            self.log.draw()
