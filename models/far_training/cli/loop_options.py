"""Command-line options of the training loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from far_training.cli.options import FOLDER, POSITIVE
from far_training.cli.settings_options import Command, pop_settings, settings_options
from far_training.loop.settings import LoopSettings

ALTERNATIVES = (("lr", "blr"), ("warmup", "warmup_epochs"), ("steps", "epochs"), ("minutes", "epochs"))
"""Pairs of settings of which the first, given on the command line, takes the place of the second in a preset."""


def loop_options(defaults: LoopSettings = LoopSettings()) -> Callable[[Command], Command]:
    """The options of the loop, gathered into the parameter `settings` (a LoopSettings)."""

    def decorate(command: Command) -> Command:
        @click.option(
            "-o", "--out", "run", type=FOLDER, required=True, help="Folder for checkpoints, metrics and sample sheets."
        )
        @settings_options(defaults)
        @functools.wraps(command)
        def with_settings(**values: Any) -> None:
            values |= dict.fromkeys(overruled(click.get_current_context()))
            command(settings=pop_settings(LoopSettings, values), **values)

        return with_settings

    return decorate


def overruled(context: click.Context) -> set[str]:
    """Settings of a preset that give way to an option of the command line with the same meaning."""

    def on_command_line(name: str) -> bool:
        return context.get_parameter_source(name) is ParameterSource.COMMANDLINE

    return {other for name, other in ALTERNATIVES if on_command_line(name) and not on_command_line(other)}


def threads_option(command: Command) -> Command:
    """--threads, which is set before anything is computed."""

    @click.option("--threads", type=POSITIVE, help="CPU threads; default: PyTorch's choice.")
    @functools.wraps(command)
    def with_threads(threads: int | None, **values: Any) -> None:
        if threads:
            import torch

            torch.set_num_threads(threads)
        command(**values)

    return with_threads
