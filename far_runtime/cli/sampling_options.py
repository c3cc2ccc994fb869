"""Options that several commands share: the subject of a picture, and the sampling settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from far_runtime.cli.option_names import option
from far_runtime.images.metadata import MAX_BATCH
from far_runtime.sampling.options import SETTINGS

PATH = click.Path(path_type=Path)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every sampling setting; the default of each is None, for the bundle's value."""
    for name, setting in reversed(SETTINGS.items()):
        command = click.option(option(name), name, type=setting.type, metavar=setting.metavar, help=setting.help)(
            command
        )
    return command


def subject_options(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --label, --prompt and --negative; `default` says in the help what is drawn without them."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option(
            "--negative",
            default="",
            metavar="TEXT",
            help="Text that guidance leads away from, used with --prompt.",
        )(command)
        command = click.option(
            "--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to draw; may be repeated."
        )(command)
        return click.option(
            "--label",
            "labels",
            multiple=True,
            metavar="NUMBER|NAME",
            help=f"Class to draw, by number, name or part of a name; may be repeated. Default: {default}.",
        )(command)

    return add


def generation_options(seed_help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --count, --seed, the sampling settings, --batch-size, --output and --each, in this order."""
    decorators = (
        click.option(
            "--count", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures of each subject."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help=seed_help),
        sampling_options,
        click.option(
            "--batch-size",
            type=click.IntRange(1, MAX_BATCH),
            default=8,
            show_default=True,
            help="Pictures drawn at once.",
        ),
        click.option(
            "-o",
            "--output",
            type=PATH,
            default="out.png",
            show_default=True,
            help="PNG file: a contact sheet with a row per subject, or the picture itself where there is only one.",
        ),
        click.option(
            "--each",
            type=PATH,
            metavar="DIR",
            help="Also write every picture as a PNG file with its settings into this folder.",
        ),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorate in reversed(decorators):
            command = decorate(command)
        return command

    return add


def take_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the sampling settings from a command's options; returns those that the user gave."""
    values = {name: options.pop(name) for name in SETTINGS}
    return {name: value for name, value in values.items() if value is not None}
