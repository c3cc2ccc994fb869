"""Options of the commands that run on Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from far_runtime.cli.engine_options import is_given

RAY_PARAMETERS = ("cpus", "gpus", "resources", "address")
"""The parameters that `ray_options` adds to a command."""


def ray_options(unit: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --address and what each unit takes of the cluster; unit: "worker" or "replica"."""
    options = (
        click.option(
            f"--cpus-per-{unit}",
            "cpus",
            type=click.FloatRange(min=0),
            default=1.0,
            show_default=True,
            help=f"Ray's CPUs for each {unit}.",
        ),
        click.option(
            f"--gpus-per-{unit}",
            "gpus",
            type=click.FloatRange(min=0),
            default=0.0,
            show_default=True,
            help=f"Ray's GPUs for each {unit}; 0.5: two {unit}s share one.",
        ),
        click.option(
            "--resource",
            "resources",
            multiple=True,
            metavar="NAME=AMOUNT",
            help=f"A custom resource of Ray's for each {unit}; may be repeated.",
        ),
        click.option(
            "--address",
            metavar="HOST:PORT",
            help="A running cluster; auto: the one on this machine. Default: RAY_ADDRESS, or else a new cluster on "
            "this machine.",
        ),
    )

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def parse_resources(texts: Sequence[str]) -> dict[str, float]:
    """Amounts by name, each from NAME=AMOUNT; raises UsageError for anything else."""
    amounts = {}
    for text in texts:
        name, _, amount = text.partition("=")
        try:
            amounts[name] = float(amount)
        except ValueError:
            amounts[name] = 0.0
        if not name or not amounts[name] > 0:
            raise click.UsageError(f"--resource {text}: expected NAME=AMOUNT, as in --resource jetson=1")
    return amounts


def refuse_without_ray(ctx: click.Context, *others: str) -> None:
    """Raise UsageError for options that have a meaning with --ray alone.

    others: the command's own parameters of that kind, beside those of `ray_options`.
    """
    names = (*RAY_PARAMETERS, *others)
    options = [param.opts[0] for param in ctx.command.params if param.name in names and is_given(ctx, param)]
    if options:
        raise click.UsageError(f"{', '.join(options)}: for --ray alone; add it, or leave them out", ctx)
