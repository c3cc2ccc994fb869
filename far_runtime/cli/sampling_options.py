"""Options that several commands share: the subject of a picture, and the sampling settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from far_runtime.cli.option_names import option
from far_runtime.sampling.options import SETTINGS


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


def take_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the sampling settings from a command's options; returns those that the user gave."""
    values = {name: options.pop(name) for name in SETTINGS}
    return {name: value for name, value in values.items() if value is not None}
