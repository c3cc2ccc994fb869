"""Command-line options of the training loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from far_training.cli.options import FOLDER, POSITIVE, SHARE


def loop_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of the loop, gathered into `settings` (a LoopSettings)."""

    def default(name: str, usual: Any) -> Any:
        return defaults.get(name, usual)

    options = [
        click.option(
            "-o", "--out", "run", type=FOLDER, required=True, help="Folder for checkpoints, metrics and sheets."
        ),
        click.option("--steps", type=POSITIVE, help="Stop after so many steps."),
        click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Stop after so many passes."),
        click.option(
            "--minutes",
            type=click.FloatRange(0, min_open=True),
            help="Stop after so many minutes of training, kept across resumes.",
        ),
        click.option(
            "--batch",
            type=POSITIVE,
            default=default("batch", 32),
            show_default=True,
            help="Pictures per step, all devices together.",
        ),
        click.option(
            "--accumulate",
            type=POSITIVE,
            default=1,
            show_default=True,
            help="Micro-batches into which a device splits its share of a step, to save memory.",
        ),
        click.option(
            "--checkpointing",
            is_flag=True,
            help="Compute transformer blocks again in the backward pass rather than keep them: less memory, a third "
            "more arithmetic.",
        ),
        click.option(
            "--shard",
            is_flag=True,
            help="Split weights, average and optimizer over the processes (PyTorch's FSDP2), to save memory.",
        ),
        click.option(
            "--lr",
            type=click.FloatRange(0, min_open=True),
            default=default("lr", 1e-4),
            show_default=True,
            help="Learning rate after the warm-up.",
        ),
        click.option(
            "--blr",
            type=click.FloatRange(0, min_open=True),
            help="Learning rate per 256 pictures of --batch, in place of --lr.",
        ),
        click.option(
            "--warmup",
            type=click.IntRange(0),
            default=default("warmup", 100),
            show_default=True,
            help="Steps over which the rate rises.",
        ),
        click.option("--warmup-epochs", type=click.FloatRange(0), help="The same in passes, in place of --warmup."),
        click.option(
            "--schedule",
            type=click.Choice(["constant", "cosine", "linear"]),
            default=default("schedule", "constant"),
            show_default=True,
            help="How the rate goes on after the warm-up.",
        ),
        click.option(
            "--lr-end",
            type=SHARE,
            default=0.0,
            show_default=True,
            help="Share of the rate that is left at the end of a cosine or linear schedule.",
        ),
        click.option(
            "--weight-decay",
            type=click.FloatRange(0),
            default=default("weight_decay", 0.02),
            show_default=True,
            help="None on biases, norms and the head.",
        ),
        click.option(
            "--weight-decay-end", type=click.FloatRange(0), help="What it becomes by the end; default: it stays."
        ),
        click.option(
            "--beta2", type=SHARE, default=default("beta2", 0.95), show_default=True, help="AdamW's second decay rate."
        ),
        click.option(
            "--clip",
            type=click.FloatRange(0),
            default=default("clip", 3.0),
            show_default=True,
            help="Largest gradient norm; 0: no clipping.",
        ),
        click.option(
            "--ema",
            type=click.FloatRange(0, 1, max_open=True),
            default=default("ema", 0.9999),
            show_default=True,
            help="Decay of the averaged weights.",
        ),
        click.option(
            "--ema-ramped/--ema-fixed", default=True, show_default=True, help="Let the average follow faster at first."
        ),
        click.option(
            "--amp",
            type=click.Choice(["auto", "on", "off"]),
            default="auto",
            show_default=True,
            help="bfloat16 autocast; auto takes what is faster here.",
        ),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
        click.option("--log-steps", type=POSITIVE, default=20, show_default=True),
        click.option(
            "--save-minutes",
            type=click.FloatRange(0),
            default=2.0,
            show_default=True,
            help="Minutes between checkpoints.",
        ),
        click.option(
            "--sheet-minutes",
            type=click.FloatRange(0),
            default=8.0,
            show_default=True,
            help="Minutes between sample sheets.",
        ),
        click.option("--resume", is_flag=True, help="Go on with the run in the folder."),
    ]
    names = [option_name(option) for option in options]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def gathered(**values: Any) -> None:
            from far_training.loop.task import LoopSettings

            settings = {name: values.pop(name) for name in names}
            settings |= dict.fromkeys(overruled(click.get_current_context()))
            command(settings=LoopSettings(**settings), **values)

        for option in reversed(options):
            gathered = option(gathered)
        return gathered

    return decorate


def overruled(context: click.Context) -> set[str]:
    """Settings of a preset that an option which says the same otherwise, and is given, takes the place of."""

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is ParameterSource.COMMANDLINE

    pairs = (("lr", "blr"), ("warmup", "warmup_epochs"), ("steps", "epochs"), ("minutes", "epochs"))
    return {other for name, other in pairs if given(name) and not given(other)}


def option_name(option: Callable[[Any], Any]) -> str:
    """The parameter name behind a click.option decorator."""

    def probe() -> None: ...

    option(probe)
    name: str = probe.__click_params__[0].name  # type: ignore[attr-defined]
    return name


def threads_option(command: Callable[..., None]) -> Callable[..., None]:
    """--threads: set before anything is computed."""

    @click.option("--threads", type=POSITIVE, help="CPU threads; default: PyTorch's choice.")
    @functools.wraps(command)
    def limited(threads: int | None, **values: Any) -> None:
        if threads:
            import torch

            torch.set_num_threads(threads)
        command(**values)

    return limited
