"""The training state on disk, in the shape of the official checkpoint-last.pth."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from far_runtime.errors import FarError

if TYPE_CHECKING:
    from far_training.loop.task import LoopSettings, Task

STATE = "checkpoint-last.pth"


def save_state(
    settings: LoopSettings,
    task: Task,
    parts: dict[str, Any],
    step: int,
    seconds: float,
    half: bool,
) -> None:
    """Write RUN/checkpoint-last.pth in the official shape, with what an exact resume needs besides; whole or not.

    parts: model, model_ema and optimizer, their whole state dicts.
    """
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    state = {
        **parts,
        "losses": {name: task.losses.get_buffer(name) for name in task.kept},
        "epoch": step * settings.batch // task.epoch_length,
        "step": step,
        "elapsed": seconds,
        "amp": half,
        # The seed of a step and its place in the data follow from these; no generator state outlives a step.
        "rng": {"seed": settings.seed, "step": step, "position": step * settings.batch % task.epoch_length},
        "args": argparse.Namespace(**{**plain, **task.args}),
        "metadata": task.metadata,
    }
    settings.run.mkdir(parents=True, exist_ok=True)
    target = settings.run / STATE
    for left in settings.run.glob(f"{target.stem}.part*"):  # of a process that was killed
        left.unlink(missing_ok=True)
    part = target.with_suffix(f".part{os.getpid()}")
    try:
        torch.save(state, part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise FarError(
            f"{target}: cannot be written ({error.strerror}); free some space or choose another --out folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def load_state(settings: LoopSettings, task: Task) -> dict[str, Any] | None:
    """The state to go on from, or None for a fresh run; FarError if the folder holds a run that does not fit."""
    path = settings.run / STATE
    if not path.exists():
        return None
    if not settings.resume:
        raise FarError(f"{path}: there is a run already; go on with --resume or choose another --out folder")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        missing = {"model", "model_ema", "optimizer", "step", "elapsed", "amp", "rng", "args"} - state.keys()
    except Exception as error:
        raise FarError(f"{path}: not a training state ({error}); remove it to start anew") from error
    if missing:
        raise FarError(f"{path}: lacks {', '.join(sorted(missing))}; it can be exported, but not resumed")
    before = vars(state["args"])
    fixed = {**task.args, "batch": settings.batch, "seed": settings.seed}
    changed = [
        f"{key} {before[key]!r} -> {value!r}" for key, value in fixed.items() if key in before and before[key] != value
    ]
    if ("beside" in state) != (task.beside is not None):
        changed.append("a discriminator, or none")
    if changed:
        raise FarError(
            f"{path}: the run was started with other settings ({'; '.join(changed)}); "
            "give the same ones or another --out folder"
        )
    return state
