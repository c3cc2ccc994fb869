"""What a run will cost, told before it starts: parameters, arithmetic, memory, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from far_training.loop.sharding import transformer_blocks

if TYPE_CHECKING:
    from far_training.loop.task import LoopSettings, Task

GUESS_STEPS = 20
"""Steps after which the rest of the run is reckoned."""


@dataclass(frozen=True)
class Cost:
    """Of one process's micro-batch. flop: forward and backward. activations: bytes kept for the backward pass."""

    flop: float
    activations: int


def measured_cost(losses: nn.Module, batch: tuple[Tensor, ...], half: bool) -> Cost:
    """Run one step without an update: the operations that PyTorch's FLOP counter knows (matrix products, convolutions,
    attention), and the distinct tensors that autograd keeps, parameters and buffers left out. Hooks stay behind."""
    from torch.utils.flop_counter import FlopCounterMode

    own = {tensor.data_ptr() for tensor in (*losses.parameters(), *losses.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def keep_inputs(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        for each in inputs:
            if isinstance(each, Tensor):
                keep(each)

    for block in transformer_blocks(losses):
        if "forward" in vars(block):  # computed again in the backward pass, from what came in
            block.register_forward_pre_hook(keep_inputs)
    counter = FlopCounterMode(display=False)
    device = batch[0].device.type
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = losses(*batch)["loss"]
        loss.backward()
    return Cost(float(counter.get_total_flops()), sum(saved.values()))


def plan_lines(task: Task, settings: LoopSettings, cost: Cost, world: int, half: bool, device: str) -> list[str]:
    """The plan, a line per subject. device: its name."""
    trained = [p for p in task.model.parameters() if p.requires_grad]
    beside = list(task.beside.parameters()) if task.beside is not None else []
    count = sum(p.numel() for p in task.model.parameters())
    share = world if settings.shard else 1
    weights = sum(p.numel() * p.element_size() for p in task.model.parameters()) // share
    gradients = sum(p.numel() * p.element_size() for p in (*trained, *beside)) // share
    memory = {
        "weights": weights + sum(p.numel() * p.element_size() for p in beside) // share,
        "their average": weights,
        "optimizer": 2 * gradients,
        "gradients": gradients,
        "activations": cost.activations,
    }
    parts = " + ".join(f"{name} {bytes_text(size)}" for name, size in memory.items())
    classes = f" of {task.args['classes']} classes" if "classes" in task.args else ""
    split = f"; weights to gradients split over {world} processes" if settings.shard else ""
    loss = [f"{key[5:]} {value}" for key, value in task.args.items() if key.startswith("loss_")]
    micro = settings.batch // world // settings.accumulate
    frozen = "" if len(trained) == len(list(task.model.parameters())) else f", {millions(trained)} of them trained"
    against = f"; {millions(beside)} beside them, against which they are trained" if beside else ""
    epoch = task.epoch_length / settings.batch
    ends = [f"{settings.steps} steps, {settings.steps / epoch:.1f} epochs"] if settings.steps else []
    ends += [f"{settings.minutes:g} minutes"] if settings.minutes else []
    where = f"{device}, {'bfloat16 autocast' if half else 'float32'}"
    processes = "processes" if world > 1 else "process"
    return [
        f"plan: {task.system}, {count / 1e6:.2f} M parameters ({by_part(task.model)}){frozen}{against}",
        f"data: {task.epoch_length} pictures{classes}, {epoch:.1f} steps an epoch",
        f"batch: {settings.batch} = {world} {processes} x {settings.accumulate} in turn x {micro}; {where}",
        f"a step: {cost.flop * world * settings.accumulate / 1e9:.1f} GFLOP",
        f"memory of a process: {bytes_text(sum(memory.values()))} = {parts}{split}",
        recipe_line(settings),
        f"loss: {', '.join(loss)}",
        f"length: {' or '.join(ends)}; the time is told after {GUESS_STEPS} steps",
    ]


def recipe_line(settings: LoopSettings) -> str:
    """How the optimizer is set."""
    falls = "" if settings.schedule == "constant" else f" to {settings.lr_end:g} of it"
    ends = "" if settings.weight_decay_end is None else f" to {settings.weight_decay_end:g}"
    return (
        f"recipe: AdamW {settings.lr:g} ({settings.schedule}{falls}, {settings.warmup} steps of warm-up), betas 0.9 "
        f"{settings.beta2:g}, weight decay {settings.weight_decay:g}{ends}, clip {settings.clip:g}, "
        f"EMA {settings.ema:g}{' ramped' if settings.ema_ramped else ''}"
    )


def by_part(model: nn.Module) -> str:
    """Parameters of the head and of the rest, or of encoder and decoder."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        key = {"diffloss": "head", "head": "head", "encoder": "encoder", "decoder": "decoder"}.get(part, "rest")
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    if "encoder" not in sizes and "rest" in sizes:
        sizes = {"transformer": sizes.pop("rest"), **sizes}
    return ", ".join(f"{name} {size / 1e6:.2f} M" for name, size in sizes.items())


def millions(parameters: Sequence[nn.Parameter]) -> str:
    """Their number as text."""
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"


def bytes_text(size: float) -> str:
    """A size with its unit."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def device_name(device: torch.device) -> str:
    """A name to print."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def hours_line(settings: LoopSettings, step: int, done: int, seconds: float, before: float) -> str:
    """How long the rest takes, by the last `done` steps, in which the clock went from `before` to `seconds`."""
    each = (seconds - before) / done
    by_steps = (settings.steps - step) * each if settings.steps else float("inf")
    by_time = 60 * settings.minutes - seconds if settings.minutes else float("inf")
    left = max(min(by_steps, by_time), 0)
    end = datetime.now() + timedelta(seconds=left)
    length = f"{left / 3600:.1f} hours" if left >= 3600 else f"{left / 60:.1f} minutes"
    return f"{each:.3f} s a step: {length} to go, until about {end:%Y-%m-%d %H:%M}"


def speed(settings: LoopSettings, cost: Cost | None, world: int, seconds: float) -> dict[str, Any]:
    """Pictures and TFLOP per second, all processes together, of a step that takes `seconds`."""
    found: dict[str, Any] = {"pictures_per_second": settings.batch / seconds}
    if cost is not None and cost.flop:
        found["tflops"] = cost.flop * world * settings.accumulate / seconds / 1e12
    return found
