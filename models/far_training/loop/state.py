"""The training state on disk, in the layout of the official checkpoint-last.pth."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from far_runtime.errors import FarError, SettingName
from far_runtime.storage.atomic import remove_parts, whole_file
from far_runtime.storage.run_record import differences
from far_training.loop.settings import LoopSettings
from far_training.loop.task import Task

STATE = "checkpoint-last.pth"
DISCRIMINATOR = "beside"
"""Key of the discriminator's weights in the state."""


def save_state(
    settings: LoopSettings, task: Task, weights: Mapping[str, Any], step: int, seconds: float, autocast: bool
) -> None:
    """Write RUN/checkpoint-last.pth, whole or not at all, with what an exact resume needs beside the official entries.

    weights: whole state dicts by key: model, model_ema, optimizer and, where there is one, the discriminator's.
    seconds: of training so far.
    FarError where it cannot be written.
    """
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    pictures = step * settings.batch
    state = {
        **weights,
        "losses": {name: task.losses.get_buffer(name) for name in task.buffers},
        "epoch": pictures // task.epoch_length,
        "step": step,
        "elapsed": seconds,
        "amp": autocast,
        # The random numbers of a step and its place in the data follow from these; no generator outlives a step.
        "rng": {"seed": settings.seed, "step": step, "position": pictures % task.epoch_length},
        "args": argparse.Namespace(**{**plain, **task.args}),
        "metadata": dict(task.metadata),
    }
    settings.run.mkdir(parents=True, exist_ok=True)
    remove_parts(settings.run, STATE)
    with whole_file(settings.run / STATE) as part:
        torch.save(state, part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())


def load_state(settings: LoopSettings, task: Task) -> dict[str, Any] | None:
    """The state to resume from, or None for a fresh run; FarError if the folder holds a run that does not fit."""
    path = settings.run / STATE
    if not path.exists():
        return None
    if not settings.resume:
        raise FarError(
            f"{path}: there is a run already; go on with ",
            SettingName("resume"),
            " or choose another ",
            SettingName("out"),
            " folder",
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        missing = {"model", "model_ema", "optimizer", "step", "elapsed", "amp", "rng", "args"} - state.keys()
    except Exception as error:
        raise FarError(f"{path}: not a training state ({error}); remove it to start a new run") from error
    if missing:
        raise FarError(f"{path}: lacks {', '.join(sorted(missing))}; it can be exported, but not resumed")
    changes = changed_settings(state, settings, task)
    if changes:
        raise FarError(
            f"{path}: the run was started with other settings ({'; '.join(changes)}); give the same ones or another ",
            SettingName("out"),
            " folder",
        )
    return state


def changed_settings(state: Mapping[str, Any], settings: LoopSettings, task: Task) -> list[str]:
    """What differs from the run that left a state, of what has to be the same."""
    saved = vars(state["args"])
    fixed = {**task.args, "batch": settings.batch, "seed": settings.seed}
    # An older state may lack a setting.
    changes = differences({key: saved.get(key, value) for key, value in fixed.items()}, fixed)
    if (DISCRIMINATOR in state) != (task.discriminator is not None):
        changes.append("a discriminator, or none")
    return changes
