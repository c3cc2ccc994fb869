"""The training loop: devices, learning rate, EMA, checkpoints that resume exactly, metrics."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from far_runtime.errors import FarError, SettingName
from far_training.loop.cost_estimate import (
    TIMED_STEPS,
    estimate_lines,
    measured_cost,
    remaining_time_line,
    throughput,
)
from far_training.loop.display import Log, ProgressDisplay
from far_training.loop.ema import EMA
from far_training.loop.metrics import MetricsLog
from far_training.loop.optimization import choose_autocast, parameter_groups, recompute_blocks
from far_training.loop.prefetch import Prefetcher
from far_training.loop.processes import ProcessGroup, StopSignal, from_main_process, mean_values
from far_training.loop.randomness import SampleRng, step_seed
from far_training.loop.settings import LoopSettings
from far_training.loop.sharding import (
    check_launcher,
    check_sharding,
    clip_gradients,
    gathered,
    gradient_sync,
    load_gathered,
    load_gathered_optimizer,
    shard,
)
from far_training.loop.state import DISCRIMINATOR, STATE, load_state, save_state
from far_training.loop.task import Task


def train(task: Task, settings: LoopSettings, log: Log = print) -> dict[str, Any]:
    """Run the loop to its end; returns a summary {steps, epochs, minutes, ...last metrics}.

    The random numbers of a sample come from (run seed, step, its place in the batch). So a resumed run repeats an
    uninterrupted one bit for bit, and several processes or micro-batches see what one process sees. Dropout inside the
    network is the exception: it differs between processes. SIGTERM and Ctrl-C stop the run after the step, with its
    state saved. FarError where RUN already holds another run and resume is off.
    """
    trainer = Trainer(task, settings.resolved(task.epoch_length))
    with ProgressDisplay(log, trainer.group.is_main) as display, StopSignal() as stop:
        trainer.prepare(display.log)
        return trainer.run(display, stop)


class Trainer:
    """A run: its network, averaged weights and optimizer, and how far it is."""

    def __init__(self, task: Task, settings: LoopSettings) -> None:
        """settings: resolved ones. FarError where the processes cannot share the batch or the weights."""
        from accelerate import Accelerator, DistributedDataParallelKwargs

        check_launcher()
        self.task, self.settings = task, settings
        find_unused = DistributedDataParallelKwargs(find_unused_parameters=task.has_unused)
        self.accelerator = accelerator = Accelerator(kwargs_handlers=[find_unused])
        self.group = ProcessGroup(
            accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone, accelerator.device
        )
        if settings.shard:
            check_sharding(self.group, forward_writes=bool(task.buffers))
        parts = self.group.world * settings.accumulate
        if settings.batch % parts:
            raise FarError(
                SettingName("batch"),
                f" {settings.batch} cannot be shared by {self.group.world} processes x ",
                SettingName("accumulate"),
                f" {settings.accumulate}; give a multiple of {parts}",
            )
        self.step, self.seconds, self.autocast = 0, 0.0, False

    def prepare(self, log: Log) -> None:
        """Print what the run will cost, and make everything ready for its first or next step."""
        task, settings = self.task, self.settings
        state = load_state(settings, task)
        if state is not None:
            self.step, self.seconds = state["step"], state["elapsed"]
        task.losses.to(self.group.device)
        self.ema = EMA(task.model, settings.ema, settings.ema_ramped)
        if settings.checkpointing:
            recompute_blocks(task.model)
        self._estimate_cost(log, None if state is None else bool(state["amp"]))
        self._distribute()
        groups = [
            group
            for module in self.trained_modules
            for group in parameter_groups(module, settings.weight_decay, task.no_decay)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)
        if state is not None:
            self._restore(state)
            log(f"resumed {settings.run} at step {self.step}, {self.seconds / 60:.1f} minutes into training")
        self.metrics = MetricsLog(settings.run, self.step) if self.group.is_main else None

    def _estimate_cost(self, log: Log, autocast: bool | None) -> None:
        """Print what the run will cost. autocast: whether it computes under autocast, if that is known already."""
        settings, group = self.settings, self.group
        probe = copy.deepcopy(self.task.losses)  # its weights may change
        batch = self._fetch(self.step, 0, self.progress)
        torch.manual_seed(step_seed(settings.seed, self.step, group.rank))
        if autocast is None:
            autocast = choose_autocast(settings.amp, probe, batch, group.device.type, log)
            autocast = bool(from_main_process(autocast, group))
        self.autocast, self.cost = autocast, measured_cost(probe, batch, autocast)
        for line in estimate_lines(self.task, settings, self.cost, group, autocast):
            log(line)

    def _distribute(self) -> None:
        """Spread the network over the processes: a copy in each, or split weights."""
        task, group = self.task, self.group
        self.whole_average = self.ema.model
        """The averaged network in one piece, for sample sheets and the end of the run."""
        if not self.settings.shard:
            self.losses = self.accelerator.prepare(task.losses)
            return
        if group.is_main:
            self.whole_average = copy.deepcopy(self.ema.model).cpu()
        shard(task.losses, group)
        shard(self.ema.model, group)
        self.losses = task.losses

    def _restore(self, state: dict[str, Any]) -> None:
        load_gathered(self.task.model, state["model"])
        load_gathered(self.ema.model, state["model_ema"])
        if self.task.discriminator is not None:
            load_gathered(self.task.discriminator, state[DISCRIMINATOR])
        load_gathered_optimizer(self.optimizer, state["optimizer"])
        for name, value in state.get("losses", {}).items():
            self.task.losses.get_buffer(name).copy_(value)

    @property
    def trained_modules(self) -> list[nn.Module]:
        """The model and the discriminator, if there is one; the gradients of each are clipped separately."""
        return [module for module in (self.task.model, self.task.discriminator) if module is not None]

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self.settings.progress(self.step, self.seconds)

    @property
    def epoch(self) -> float:
        """Passes through the data so far."""
        return self.step * self.settings.batch / self.task.epoch_length

    def run(self, display: ProgressDisplay, stop: StopSignal) -> dict[str, Any]:
        """Train to the end, or until a signal stops the run."""
        with Prefetcher(self._fetch) as prefetcher:
            latest = self._train_steps(display, stop, prefetcher)
        self.save()
        run, minutes = self.settings.run, self.seconds / 60
        if self.progress < 1:
            display.log(f"stopped at step {self.step}, the state is saved; go on with the same command and --resume")
        else:
            self.report()
            if self.group.is_main:
                summary = {"steps": self.step, "minutes": round(minutes, 1), **latest}
                self.task.finish(self.whole_average, run, summary)
            display.log(f"done: {self.step} steps in {minutes:.1f} minutes; {run / STATE}")
            for sheet in sorted((run / "sheets").glob(f"*-{self.step:06d}.png")):
                display.log(f"sheet: {sheet}")
        self.group.wait()  # no process may take the connections down before the others are done
        self.accelerator.end_training()
        return {"steps": self.step, "epochs": self.epoch, "minutes": minutes, **latest}

    def _fetch(self, step: int, part: int, progress: float) -> tuple[Tensor, ...]:
        """Micro-batch `part` of a step, of this process, at a share `progress` of the run."""
        places = range(self.group.rank, self.settings.batch, self.group.world)[part :: self.settings.accumulate]
        rng = SampleRng(self.settings.seed, step, places)
        return tuple(tensor.to(self.group.device) for tensor in self.task.fetch(rng, progress))

    def _train_steps(self, display: ProgressDisplay, stop: StopSignal, prefetcher: Prefetcher) -> dict[str, float]:
        """All steps, with their log lines, states and sheets; returns the numbers of the last log line."""
        settings = self.settings
        last_save = last_sheet = self.seconds
        self._clock, self._next_progress = time.monotonic(), self.progress
        measured: list[dict[str, Tensor]] = []
        latest: dict[str, float] = {}
        first_step, first_seconds = logged_step, logged_seconds = self.step, self.seconds
        while self.progress < 1 and not stop.received(self.group):
            measured += self._train_step(prefetcher)
            display.update(self.step, self.progress)
            if self.step == first_step + TIMED_STEPS:
                step_seconds = (self.seconds - first_seconds) / TIMED_STEPS
                display.log(remaining_time_line(settings, self.step, self.seconds, step_seconds))
            save_due = self.seconds - last_save > 60 * settings.save_minutes
            if self.step % settings.log_steps == 0:
                step_seconds = (self.seconds - logged_seconds) / (self.step - logged_step)
                latest = self._means(measured) | throughput(settings, self.cost, self.group.world, step_seconds)
                measured, logged_step, logged_seconds = [], self.step, self.seconds
                if self.metrics is not None:
                    self.metrics.add(self.step, self.seconds, latest)
                    display.log_metrics(self.step, self.epoch, self.seconds / 60, latest)
            if save_due:
                self._means(measured)
                self.save()
                last_save, self._clock = self.seconds, time.monotonic()
            if self.seconds - last_sheet > 60 * settings.sheet_minutes:
                self.report()
                last_sheet, self._clock = self.seconds, time.monotonic()
        self._means(measured)
        return latest

    def _train_step(self, prefetcher: Prefetcher) -> list[dict[str, Tensor]]:
        """One step of the optimizer; returns what each of its micro-batches measured."""
        settings, group, last = self.settings, self.group, self.settings.accumulate - 1
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = settings.learning_rate(self.step, self.seconds)
        for parameters in self.optimizer.param_groups[::2]:  # every second group has no weight decay
            parameters["weight_decay"] = settings.decay(self.step, self.seconds)
        torch.manual_seed(step_seed(settings.seed, self.step, group.rank))  # dropout
        progress, self._next_progress = self._next_progress, settings.progress(self.step + 1, self.seconds)
        measured = []
        for part in range(settings.accumulate):
            following = (self.step, part + 1, progress) if part < last else (self.step + 1, 0, self._next_progress)
            batch = prefetcher.get((self.step, part, progress), following)
            with gradient_sync(self.losses, enabled=part == last):
                with torch.autocast(group.device.type, torch.bfloat16, enabled=self.autocast):
                    values = self.losses(*batch)
                (values["loss"] / settings.accumulate).backward()
            measured.append({name: value.detach() for name, value in values.items()})
        norms = [clip_gradients(module, settings.clip or math.inf) for module in self.trained_modules]
        measured[-1]["gradient"] = norms[0]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.task.model, self.step)
        self.step += 1
        now = time.monotonic()
        self.seconds = from_main_process(self.seconds + now - self._clock, group)
        self._clock = now
        return measured

    def _means(self, measured: list[dict[str, Tensor]]) -> dict[str, float]:
        """Mean values of some steps; FarError where the loss is not finite, so that no such state is saved."""
        if not measured:
            return {}
        rate = self.settings.learning_rate(self.step - 1, self.seconds)
        means = mean_values(measured, self.group) | {"rate": rate, "step_seconds": self.seconds / self.step}
        if not math.isfinite(means["loss"]):
            raise FarError(
                f"the loss became {means['loss']} at step {self.step}; lower ",
                SettingName("lr"),
                f", or resume from an earlier {STATE}",
            )
        return means

    def save(self) -> None:
        """Write the state; all processes take part in gathering split weights."""
        model, average = gathered(self.task.model.state_dict()), gathered(self.ema.model.state_dict())
        weights = {"model": model, "model_ema": average, "optimizer": gathered(self.optimizer.state_dict())}
        if self.task.discriminator is not None:
            weights[DISCRIMINATOR] = gathered(self.task.discriminator.state_dict())
        if self.group.is_main:
            save_state(self.settings, self.task, weights, self.step, self.seconds, self.autocast)

    def report(self) -> None:
        """Write a sample sheet and the curves."""
        average = gathered(self.ema.model.state_dict()) if self.settings.shard else None
        if self.metrics is None:
            return
        if average is not None:
            self.whole_average.load_state_dict(average)
        self.whole_average.to(self.group.device)
        self.metrics.add(self.step, self.seconds, self.task.report(self.whole_average, self.step, self.settings.run))
        self.metrics.draw()
        if average is not None:
            self.whole_average.cpu()
