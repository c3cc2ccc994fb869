"""The training loop: devices, learning rate, EMA, checkpoints that resume exactly, metrics."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from far_runtime.errors import FarError
from far_training.loop.cost_estimate import GUESS_STEPS, device_name, hours_line, measured_cost, plan_lines, speed
from far_training.loop.display import ProgressDisplay
from far_training.loop.ema import EMA
from far_training.loop.metrics import MetricsLog
from far_training.loop.optimization import choose_amp, parameter_groups, recompute_blocks
from far_training.loop.prefetch import Prefetcher
from far_training.loop.processes import StopSignal, agreed, averages
from far_training.loop.randomness import SampleRng, step_seed
from far_training.loop.sharding import (
    check_launcher,
    check_split,
    clipped_norm,
    exchanging,
    fill,
    fill_optimizer,
    split,
    whole,
)
from far_training.loop.state import STATE, load_state, save_state
from far_training.loop.task import LoopSettings, Task


def train(task: Task, settings: LoopSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the loop to its end; returns a summary {steps, epochs, minutes, ...last metrics}.

    What is random of a sample comes from (run seed, step, its place in the batch), so that a resumed run repeats a
    straight one bit for bit, and several processes or micro-batches see what one sees; dropout inside the network
    alone is each process's own. SIGTERM and Ctrl-C end the run after the step, with its state saved. Raises FarError
    where RUN already holds another run and resume is off.
    """
    trainer = Trainer(task, settings.resolved(task.epoch_length))
    with ProgressDisplay(say, trainer.main) as shown, StopSignal() as ending:
        trainer.prepare(shown.say)
        return trainer.run(shown, ending)


class Trainer:
    """A run: network, average, optimizer, and how far it is. settings: resolved. `prepare` comes before `run`."""

    def __init__(self, task: Task, settings: LoopSettings) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        check_launcher()
        self.task, self.settings = task, settings
        self.accelerator = Accelerator(
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=task.unused)]
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        if settings.shard:
            check_split(self.world, task.kept)
        if settings.batch % (self.world * settings.accumulate):
            raise FarError(
                f"--batch {settings.batch} cannot be shared by {self.world} processes x --accumulate "
                f"{settings.accumulate}; give a multiple of {self.world * settings.accumulate}"
            )
        self.step, self.seconds, self.half = 0, 0.0, False

    def prepare(self, say: Callable[[str], None]) -> None:
        """Tell what the run will cost, and make everything ready for its first or next step."""
        task, settings = self.task, self.settings
        state = load_state(settings, task)
        if state is not None:
            self.step, self.seconds = state["step"], state["elapsed"]
        task.losses.to(self.device)
        self.ema = EMA(task.model, settings.ema, settings.ema_ramped)
        self.drawn = self.ema.model
        if settings.checkpointing:
            recompute_blocks(task.model)
        self._plan(say, None if state is None else bool(state["amp"]))
        if settings.shard:
            if self.main:
                self.drawn = copy.deepcopy(self.drawn).cpu()
            split(task.losses, self.device, self.world)
            split(self.ema.model, self.device, self.world)
            self.losses: nn.Module = task.losses
        else:
            self.losses = self.accelerator.prepare(task.losses)
        groups = [
            group for module in self.trained for group in parameter_groups(module, settings.weight_decay, task.no_decay)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)
        if state is not None:
            self._restore(state)
            say(f"resumed {settings.run} at step {self.step}, {self.seconds / 60:.1f} minutes into training")
        self.log = MetricsLog(settings.run, self.step) if self.main else None

    def _plan(self, say: Callable[[str], None], half: bool | None) -> None:
        """Tell what the run will cost. half: whether it computes under autocast, if that is known."""
        settings = self.settings
        probe = copy.deepcopy(self.task.losses)  # its weights may change
        batch = self._fetch(self.step, 0, self.done)
        torch.manual_seed(step_seed(settings.seed, self.step, self.rank))
        if half is None:
            half = choose_amp(settings.amp, probe, batch, self.device.type, say)
            half = bool(agreed(half, self.world, self.device))
        self.half, self.cost = half, measured_cost(probe, batch, half)
        for line in plan_lines(self.task, settings, self.cost, self.world, half, device_name(self.device)):
            say(line)

    def _restore(self, state: dict[str, Any]) -> None:
        fill(self.task.model, state["model"])
        fill(self.ema.model, state["model_ema"])
        if self.task.beside is not None:
            fill(self.task.beside, state["beside"])
        fill_optimizer(self.optimizer, state["optimizer"])
        for name, value in state.get("losses", {}).items():
            self.task.losses.get_buffer(name).copy_(value)

    @property
    def trained(self) -> list[nn.Module]:
        """What has an optimizer's parameters: the model, and what is trained beside it, each clipped on its own."""
        return [module for module in (self.task.model, self.task.beside) if module is not None]

    @property
    def done(self) -> float:
        """Share of the run that is done."""
        return self.settings.progress(self.step, self.seconds)

    @property
    def epoch(self) -> float:
        """Passes through the data."""
        return self.step * self.settings.batch / self.task.epoch_length

    def run(self, shown: ProgressDisplay, ending: StopSignal) -> dict[str, Any]:
        """Train to the end, or until the run is asked to end."""
        with Prefetcher(self._fetch) as ahead:
            latest = self._steps(shown, ending, ahead)
        self.save()
        minutes = self.seconds / 60
        if self.done < 1:
            shown.say(f"ended at step {self.step}, the state is saved; go on with the same command and --resume")
        else:
            self.report()
            if self.main:
                summary = {"steps": self.step, "minutes": round(minutes, 1), **latest}
                self.task.finish(self.drawn, self.settings.run, summary)
            shown.say(f"done: {self.step} steps in {minutes:.1f} minutes; {self.settings.run / STATE}")
            for sheet in sorted((self.settings.run / "sheets").glob(f"*-{self.step:06d}.png")):
                shown.say(f"sheet: {sheet}")
        self.accelerator.wait_for_everyone()  # no process takes the connections down before the others are done
        self.accelerator.end_training()
        return {"steps": self.step, "epochs": self.epoch, "minutes": minutes, **latest}

    def _fetch(self, step: int, part: int, done: float) -> tuple[Tensor, ...]:
        """Micro-batch `part` of a step, of this process."""
        places = range(self.rank, self.settings.batch, self.world)[part :: self.settings.accumulate]
        chance = SampleRng(self.settings.seed, step, places)
        return tuple(each.to(self.device) for each in self.task.fetch(chance, done))

    def _steps(self, shown: ProgressDisplay, ending: StopSignal, ahead: Prefetcher) -> dict[str, float]:
        """All steps, with their logs, states and sheets; what was logged last."""
        settings = self.settings
        saved = sheeted = self.seconds
        self._clock, self._share = time.monotonic(), self.done
        window: list[dict[str, Tensor]] = []
        latest: dict[str, float] = {}
        begun = logged = (self.step, self.seconds)
        while self.done < 1 and not ending.asked(self.world, self.device):
            window += self._train_step(ahead)
            shown.at(self.step, self.done)
            if self.step == begun[0] + GUESS_STEPS:
                shown.say(hours_line(settings, self.step, GUESS_STEPS, self.seconds, begun[1]))
            due = self.seconds - saved > 60 * settings.save_minutes
            if self.step % settings.log_steps == 0:
                latest = self._averaged(window)
                latest |= speed(settings, self.cost, self.world, (self.seconds - logged[1]) / (self.step - logged[0]))
                window, logged = [], (self.step, self.seconds)
                if self.log is not None:
                    self.log.add(self.step, self.seconds, latest)
                    shown.log(self.step, self.epoch, self.seconds / 60, latest)
            if due:
                self._averaged(window)
                self.save()
                saved, self._clock = self.seconds, time.monotonic()
            if self.seconds - sheeted > 60 * settings.sheet_minutes:
                self.report()
                sheeted, self._clock = self.seconds, time.monotonic()
        self._averaged(window)
        return latest

    def _train_step(self, ahead: Prefetcher) -> list[dict[str, Tensor]]:
        """One step of the optimizer; what each of its micro-batches measured."""
        settings, last = self.settings, self.settings.accumulate - 1
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(self.step, self.seconds)
        for group in self.optimizer.param_groups[::2]:  # every second one does not decay
            group["weight_decay"] = settings.decay(self.step, self.seconds)
        torch.manual_seed(step_seed(settings.seed, self.step, self.rank))  # dropout
        share, self._share = self._share, settings.progress(self.step + 1, self.seconds)
        measured = []
        for part in range(settings.accumulate):
            following = (self.step, part + 1, share) if part < last else (self.step + 1, 0, self._share)
            batch = ahead.take((self.step, part, share), following)
            with exchanging(self.losses, part == last):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                    values = self.losses(*batch)
                (values["loss"] / settings.accumulate).backward()
            measured.append({name: value.detach() for name, value in values.items()})
        norms = [clipped_norm(module, settings.clip or math.inf) for module in self.trained]
        measured[-1]["gradient"] = norms[0]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.task.model, self.step)
        self.step += 1
        now = time.monotonic()
        self.seconds = agreed(self.seconds + now - self._clock, self.world, self.device)
        self._clock = now
        return measured

    def _averaged(self, window: list[dict[str, Tensor]]) -> dict[str, float]:
        """The averages of some steps, if any; FarError where the loss is no number any more, before it is saved."""
        if not window:
            return {}
        rate = self.settings.rate(self.step - 1, self.seconds)
        latest = averages(window, self.world) | {"rate": rate, "step_seconds": self.seconds / self.step}
        if not math.isfinite(latest["loss"]):
            raise FarError(
                f"the loss became {latest['loss']} at step {self.step}; lower --lr, or resume from an earlier {STATE}"
            )
        return latest

    def save(self) -> None:
        """Write the state; the processes gather split weights together."""
        model, average = whole(self.task.model.state_dict()), whole(self.ema.model.state_dict())
        parts = {"model": model, "model_ema": average, "optimizer": whole(self.optimizer.state_dict())}
        if self.task.beside is not None:
            parts["beside"] = whole(self.task.beside.state_dict())
        if self.main:
            save_state(self.settings, self.task, parts, self.step, self.seconds, self.half)

    def report(self) -> None:
        """Draw a sheet and the curves."""
        average = whole(self.ema.model.state_dict()) if self.settings.shard else None
        if self.log is None:
            return
        if average is not None:
            self.drawn.load_state_dict(average)
        self.drawn.to(self.device)
        self.log.add(self.step, self.seconds, self.task.report(self.drawn, self.step, self.settings.run))
        self.log.draw()
        if average is not None:
            self.drawn.cpu()
