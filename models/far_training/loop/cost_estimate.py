"""What a run will cost, printed before it starts: parameters, arithmetic, memory, length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import torch
from torch import Tensor, nn

from far_training.loop.processes import ProcessGroup
from far_training.loop.settings import LoopSettings
from far_training.loop.sharding import transformer_blocks
from far_training.loop.task import Task

TIMED_STEPS = 20
"""Steps after which the remaining time is estimated."""


@dataclass(frozen=True)
class Cost:
    """What one process computes and stores for one micro-batch."""

    flop: float
    """Floating-point operations of the forward and backward pass."""
    activations: int
    """Bytes that are stored for the backward pass."""


def measured_cost(losses: nn.Module, batch: tuple[Tensor, ...], autocast: bool) -> Cost:
    """Run one step without an update, and count.

    The operations are those that PyTorch's FLOP counter knows: matrix products, convolutions, attention. The
    activations are the distinct tensors that autograd stores, without parameters and buffers. Hooks stay on the blocks.
    """
    from torch.utils.flop_counter import FlopCounterMode

    weights = {tensor.data_ptr() for tensor in (*losses.parameters(), *losses.buffers())}
    stored: dict[int, int] = {}

    def store(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    def store_inputs(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        for value in inputs:
            if isinstance(value, Tensor):
                store(value)

    for block in transformer_blocks(losses):
        if "forward" in vars(block):  # recomputed in the backward pass, from its inputs
            block.register_forward_pre_hook(store_inputs)
    counter = FlopCounterMode(display=False)
    device = batch[0].device.type
    with counter, torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = losses(*batch)["loss"]
        loss.backward()
    return Cost(float(counter.get_total_flops()), sum(stored.values()))


def estimate_lines(task: Task, settings: LoopSettings, cost: Cost, group: ProcessGroup, autocast: bool) -> list[str]:
    """The estimate, one line per subject."""
    parameters = list(task.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    rivals = list(task.discriminator.parameters()) if task.discriminator is not None else []
    classes = f" of {task.args['classes']} classes" if "classes" in task.args else ""
    loss = [f"{key[5:]} {value}" for key, value in task.args.items() if key.startswith("loss_")]
    micro_batch = settings.batch // group.world // settings.accumulate
    frozen = "" if len(trained) == len(parameters) else f", {millions(trained)} of them trained"
    discriminator = f"; {millions(rivals)} of a discriminator" if rivals else ""
    epoch = task.epoch_length / settings.batch
    ends = [f"{settings.steps} steps, {settings.steps / epoch:.1f} epochs"] if settings.steps else []
    ends += [f"{settings.minutes:g} minutes"] if settings.minutes else []
    where = f"{device_name(group.device)}, {'bfloat16 autocast' if autocast else 'float32'}"
    processes = "processes" if group.world > 1 else "process"
    return [
        f"model: {task.system}, {millions(parameters)} parameters ({parameters_by_part(task.model)})"
        f"{frozen}{discriminator}",
        f"data: {task.epoch_length} pictures{classes}, {epoch:.1f} steps an epoch",
        f"batch: {settings.batch} = {group.world} {processes} x {settings.accumulate} in turn x {micro_batch}; {where}",
        f"a step: {cost.flop * group.world * settings.accumulate / 1e9:.1f} GFLOP",
        memory_line(task, settings.shard, cost, group),
        optimizer_line(settings),
        f"loss: {', '.join(loss)}",
        f"length: {' or '.join(ends)}; the remaining time is estimated after {TIMED_STEPS} steps",
    ]


def memory_line(task: Task, shard: bool, cost: Cost, group: ProcessGroup) -> str:
    """The memory that a process takes, and for what. shard: whether the weights are split over the processes."""
    rivals = list(task.discriminator.parameters()) if task.discriminator is not None else []
    share = group.world if shard else 1
    weights = byte_count(task.model.parameters()) // share
    gradients = byte_count([*(p for p in task.model.parameters() if p.requires_grad), *rivals]) // share
    memory = {
        "weights": weights + byte_count(rivals) // share,
        "their average": weights,
        "optimizer": 2 * gradients,
        "gradients": gradients,
        "activations": cost.activations,
    }
    parts = " + ".join(f"{name} {bytes_text(size)}" for name, size in memory.items())
    split = f"; weights to gradients split over {group.world} processes" if shard else ""
    return f"memory of a process: {bytes_text(sum(memory.values()))} = {parts}{split}"


def optimizer_line(settings: LoopSettings) -> str:
    """How the optimizer is set."""
    falls = "" if settings.schedule == "constant" else f" to {settings.lr_end:g} of it"
    decay_end = "" if settings.weight_decay_end is None else f" to {settings.weight_decay_end:g}"
    return (
        f"recipe: AdamW {settings.lr:g} ({settings.schedule}{falls}, {settings.warmup} steps of warm-up), betas 0.9 "
        f"{settings.beta2:g}, weight decay {settings.weight_decay:g}{decay_end}, clip {settings.clip:g}, "
        f"EMA {settings.ema:g}{' ramped' if settings.ema_ramped else ''}"
    )


def parameters_by_part(model: nn.Module) -> str:
    """Parameters of the head and of the rest, or of encoder and decoder, as text."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        prefix = name.partition(".")[0]
        part = {"diffloss": "head", "head": "head", "encoder": "encoder", "decoder": "decoder"}.get(prefix, "rest")
        parts.setdefault(part, []).append(parameter)
    if "encoder" not in parts and "rest" in parts:
        parts = {"transformer": parts.pop("rest"), **parts}
    return ", ".join(f"{name} {millions(parameters)}" for name, parameters in parts.items())


def millions(parameters: Iterable[nn.Parameter]) -> str:
    """Number of parameters as text."""
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.2f} M"


def byte_count(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def bytes_text(size: float) -> str:
    """A number of bytes with its unit."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def device_name(device: torch.device) -> str:
    """Name of a device, to print."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def remaining_time_line(settings: LoopSettings, step: int, seconds: float, step_seconds: float) -> str:
    """How long the rest takes, `seconds` into the run, for steps of `step_seconds`."""
    by_steps = (settings.steps - step) * step_seconds if settings.steps else float("inf")
    by_time = 60 * settings.minutes - seconds if settings.minutes else float("inf")
    left = max(min(by_steps, by_time), 0)
    end = datetime.now() + timedelta(seconds=left)
    length = f"{left / 3600:.1f} hours" if left >= 3600 else f"{left / 60:.1f} minutes"
    return f"{step_seconds:.3f} s a step: {length} to go, until about {end:%Y-%m-%d %H:%M}"


def throughput(settings: LoopSettings, cost: Cost, world: int, step_seconds: float) -> dict[str, float]:
    """Pictures and TFLOP per second, summed over `world` processes, of a step that takes `step_seconds`."""
    rates = {"pictures_per_second": settings.batch / step_seconds}
    if cost.flop:
        rates["tflops"] = cost.flop * world * settings.accumulate / step_seconds / 1e12
    return rates
