"""Command-line options that several trainers have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from far_training.cli.settings_options import Command

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
SHARE = click.FloatRange(0, 1)
POSITIVE = click.IntRange(1)
AMOUNT = click.FloatRange(0)
FACTOR = click.FloatRange(0, min_open=True)


def _option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    return click.option(*names, show_default=True, **settings)


SHARED: dict[str, Callable[[Command], Command]] = {
    "pictures": _option(
        "--data",
        type=FOLDER,
        required=True,
        help="Picture folder: images.npy and labels.npy, or a subfolder per class.",
    ),
    "latents": _option(
        "--data", type=FOLDER, required=True, help="Cached latents, or pictures that are encoded at every step."
    ),
    "vae": _option(
        "--vae", "vae_file", type=FILE, required=True, help="KL-VAE checkpoint, for the latents and the sample sheets."
    ),
    "out": _option("-o", "--out", type=FOLDER, required=True, help="Folder to write."),
    "size": _option("--size", type=POSITIVE, default=64, help="Side in pixels to which image folders are resized."),
    "extra": _option("--extra", type=FOLDER, help="A second picture folder that is mixed in."),
    "extra_share": _option("--extra-share", type=SHARE, default=0.25, help="Share of each batch from --extra."),
    "ch": _option("--ch", type=POSITIVE, default=32, help="Channels of the first resolution."),
    "multipliers": _option("--multipliers", default="1,2,4", help="Channels of each resolution in units of --ch."),
    "blocks": _option("--blocks", type=POSITIVE, default=1, help="Residual blocks per resolution."),
    "channels": _option("--channels", type=POSITIVE, default=16, help="Channels of the latents."),
    "patch": _option(
        "--patch", type=POSITIVE, default=2, help="Side in pixels of the patches that are folded into channels first."
    ),
    "init": _option(
        "--init", type=FILE, help="Start from the weights of this checkpoint, which has to be of the same sizes."
    ),
    "width": _option("--width", type=POSITIVE, help="Width of the transformer."),
    "depth": _option("--depth", type=POSITIVE, help="Transformer blocks; in FAR and MAR of encoder and decoder each."),
    "heads": _option("--heads", type=POSITIVE, help="Attention heads."),
    "buffer": _option("--buffer", type=click.IntRange(0), help="Buffer tokens that carry the class."),
    "head_width": _option("--head-width", type=POSITIVE, help="Width of the diffusion head."),
    "head_depth": _option("--head-depth", type=POSITIVE, help="Blocks of the diffusion head."),
    "classes": _option("--classes", type=POSITIVE, help="Number of classes; default: that of the data."),
    "latent_scale": _option(
        "--latent-scale", type=FACTOR, help="Factor of the latents; default: 1 / their standard deviation."
    ),
    "prediction": _option(
        "--prediction",
        type=click.Choice(["epsilon", "v"]),
        default="epsilon",
        help="What the diffusion head predicts: the noise (epsilon), or the velocity (v).",
    ),
    "sheet_steps": _option(
        "--sheet-steps", default="25", help="Diffusion steps on sample sheets, at every level, iteration or scale."
    ),
    "sheet_guidance": _option("--sheet-guidance", type=AMOUNT, default=2.0, help="Guidance scale on sample sheets."),
}


def shared(*names: str) -> Callable[[Command], Command]:
    """The options of these names, in this order."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = SHARED[name](command)
        return command

    return decorate


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """Positive whole numbers from a text like "1,2,4"; a click error for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(
            f"{text!r}; expected whole numbers with commas between, as in 1,2,4", param_hint=option
        )
    return tuple(int(part) for part in parts)
