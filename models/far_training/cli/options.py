"""Command-line options that trainers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
SHARE = click.FloatRange(0, 1)
POSITIVE = click.IntRange(1)
AMOUNT = click.FloatRange(0)
FACTOR = click.FloatRange(0, min_open=True)
Command = Callable[..., None]
Settings = TypeVar("Settings")

SHARED: dict[str, Callable[[Command], Command]] = {
    "pictures": click.option(
        "--data",
        type=FOLDER,
        required=True,
        help="Picture folder: images.npy and labels.npy, or a subfolder per class.",
    ),
    "latents": click.option(
        "--data", type=FOLDER, required=True, help="Cached latents, or pictures that are encoded at every step."
    ),
    "vae": click.option(
        "--vae",
        "vae_file",
        type=FILE,
        required=True,
        help="KL-VAE checkpoint, for the latents and the sample sheets.",
    ),
    "size": click.option(
        "--size",
        type=POSITIVE,
        default=64,
        show_default=True,
        help="Side in pixels to which image folders are resized.",
    ),
    "extra": click.option("--extra", type=FOLDER, help="A second picture folder that is mixed in."),
    "extra_share": click.option(
        "--extra-share", type=SHARE, default=0.25, show_default=True, help="Part of each batch from --extra."
    ),
    "ch": click.option("--ch", type=POSITIVE, default=32, show_default=True, help="Channels of the first resolution."),
    "multipliers": click.option(
        "--multipliers", default="1,2,4", show_default=True, help="Channels of each resolution in units of --ch."
    ),
    "blocks": click.option(
        "--blocks", type=POSITIVE, default=1, show_default=True, help="Residual blocks per resolution."
    ),
    "channels": click.option(
        "--channels", type=POSITIVE, default=16, show_default=True, help="Channels of the latents."
    ),
    "patch": click.option(
        "--patch", type=POSITIVE, default=2, show_default=True, help="Pixels folded into channels first, per side."
    ),
    "square": click.option(
        "--square", type=AMOUNT, default=1.0, show_default=True, help="Weight of the mean squared error."
    ),
    "gradient": click.option(
        "--gradient", type=AMOUNT, default=0.5, show_default=True, help="Weight of the L1 of pixel differences."
    ),
    "init": click.option(
        "--init", type=FILE, help="Start from the weights of this checkpoint, which has to be of the same sizes."
    ),
    "width": click.option("--width", type=POSITIVE, help="Width of the transformer."),
    "depth": click.option("--depth", type=POSITIVE, help="Blocks; FAR and MAR: of the encoder, and of the decoder."),
    "heads": click.option("--heads", type=POSITIVE, help="Attention heads."),
    "buffer": click.option("--buffer", type=click.IntRange(0), help="Buffer tokens that carry the class."),
    "head_width": click.option("--head-width", type=POSITIVE, help="Width of the diffusion head."),
    "head_depth": click.option("--head-depth", type=POSITIVE, help="Blocks of the diffusion head."),
    "classes": click.option("--classes", type=POSITIVE, help="Classes; default: the data's."),
    "latent_scale": click.option(
        "--latent-scale", type=FACTOR, help="Factor of the latents; default: 1 / their deviation."
    ),
    "prediction": click.option(
        "--prediction", type=click.Choice(["epsilon", "v"]), default="epsilon", show_default=True
    ),
    "simplify": click.option(
        "--simplify/--no-simplify",
        default=True,
        show_default=True,
        help="Target: the full latents, or those of the next level.",
    ),
    "weight_levels": click.option(
        "--level-weight/--no-level-weight",
        "weight_levels",
        default=True,
        show_default=True,
        help="Frequency-aware loss weight.",
    ),
    "low": click.option(
        "--low",
        type=AMOUNT,
        default=0.0,
        show_default=True,
        help="How much more often low levels are drawn than high ones.",
    ),
    "mask_least": click.option(
        "--mask-least",
        type=SHARE,
        default=0.7,
        show_default=True,
        help="Least share of masked tokens; the share is normal around 1, cut to it.",
    ),
    "label_drop": click.option(
        "--label-drop", type=SHARE, default=0.1, show_default=True, help="Share of samples without their class."
    ),
    "input_noise": click.option(
        "--input-noise",
        type=AMOUNT,
        default=0.0,
        show_default=True,
        help="Deviation of the noise on the input latents, times |n| per sample.",
    ),
    "draws": click.option(
        "--draws", type=POSITIVE, default=4, show_default=True, help="Noise draws per token (diffusion_batch_mul)."
    ),
    "flip": click.option("--flip", type=SHARE, default=0.5, show_default=True, help="Share of mirrored samples."),
    "flip_until": click.option(
        "--flip-until",
        type=SHARE,
        default=1.0,
        show_default=True,
        help="Share of the run after which none are mirrored.",
    ),
    "dropout": click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True),
    "learned_variance": click.option(
        "--learned-variance/--fixed-variance",
        default=True,
        show_default=True,
        help="With or without the variational bound.",
    ),
    "sheet_steps": click.option(
        "--sheet-steps", default="25", show_default=True, help="Diffusion steps on sample sheets, each time."
    ),
    "sheet_guidance": click.option("--sheet-guidance", type=AMOUNT, default=2.0, show_default=True),
}


def shared(*names: str) -> Callable[[Command], Command]:
    """The options of these names, in this order."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = SHARED[name](command)
        return command

    return decorate


def pop_settings(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Settings of a dataclass from the values of its fields' names, which are taken out of `values`."""
    names = [field.name for field in fields(kind) if field.name in values]  # type: ignore[arg-type]
    return kind(**{name: values.pop(name) for name in names})


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Numbers from "1,2,4"; a click error for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(
            f"{text!r}; expected whole numbers with commas between, as in 1,2,4", param_hint=option
        )
    return tuple(int(part) for part in parts)


def say(line: str) -> None:
    """Print one line at once, so that logs of background runs are never behind."""
    click.echo(line)
