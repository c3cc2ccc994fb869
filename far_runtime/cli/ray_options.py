"""Options that commands share that run on Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from far_runtime.cli.engine_options import is_given

OF_RAY = ("cpus", "gpus", "resources", "address")


def ray_options(each: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add what each worker or replica takes, and --address."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option(
            "--address",
            metavar="HOST:PORT",
            help="Of a running cluster; auto: the one of this machine. Default: RAY_ADDRESS, else a new one of this "
            "machine.",
        )(command)
        command = click.option(
            "--resource",
            "resources",
            multiple=True,
            metavar="NAME=AMOUNT",
            help=f"Of Ray's custom resources, for each {each}; may be repeated.",
        )(command)
        command = click.option(
            f"--gpus-per-{each}",
            "gpus",
            type=click.FloatRange(min=0),
            default=0.0,
            show_default=True,
            help=f"Ray's GPUs; 0.5: two {each}s share one.",
        )(command)
        return click.option(
            f"--cpus-per-{each}",
            "cpus",
            type=click.FloatRange(min=0),
            default=1.0,
            show_default=True,
            help="Ray's CPUs.",
        )(command)

    return add


def resources_of(given: Sequence[str]) -> dict[str, float]:
    """Amounts by name, of NAME=AMOUNT; UsageError for anything else."""
    found = {}
    for text in given:
        name, _, amount = text.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = 0.0
        if not name or not found[name] > 0:
            raise click.UsageError(f"--resource {text}: expected NAME=AMOUNT, as in --resource jetson=1")
    return found


def refuse_without_ray(ctx: click.Context, *others: str) -> None:
    """UsageError for options that mean something with --ray alone; others: parameters beside those of `ray_options`."""
    wanted = (*OF_RAY, *others)
    given = [one.opts[0] for one in ctx.command.params if one.name in wanted and is_given(ctx, one)]
    if given:
        raise click.UsageError(f"{', '.join(given)}: for --ray alone; add it, or leave them out", ctx)
