"""Official training recipes as defaults of a command's options: --preset far-b."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

RECIPE: dict[str, Any] = {
    "blr": 1e-4,
    "warmup_epochs": 100,
    "schedule": "constant",
    "weight_decay": 0.02,
    "beta2": 0.95,
    "clip": 3.0,
    "ema": 0.9999,
    "ema_ramped": False,
    "label_drop": 0.1,
    "dropout": 0.1,
    "draws": 4,
    "latent_scale": 0.2325,
    "buffer": 64,
    "prediction": "epsilon",
    "learned_variance": True,
    "input_noise": 0.0,
    "flip": 0.5,
    "flip_until": 1.0,
}
"""What FAR and MAR have in common (main_far.py, main_mar.py): the rate is 1e-4 per 256 pictures of a batch."""

FAR_RECIPE = {**RECIPE, "simplify": True, "weight_levels": True, "mask": "off", "levels": "batch", "low": 0.0}
MAR_RECIPE = {**RECIPE, "mask_least": 0.7}
SIZES = {"b": "base", "l": "large", "h": "huge"}

FAR_PRESETS = {f"far-{size}": {**FAR_RECIPE, "model": f"far_{name}"} for size, name in SIZES.items()}
MAR_PRESETS = {f"mar-{size}": {**MAR_RECIPE, "model": f"mar_{name}"} for size, name in SIZES.items()}


def preset_option(presets: Mapping[str, Mapping[str, Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add --preset, whose values take the place of the options' defaults; an option that is given stays."""

    def take(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.default_map = {**(context.default_map or {}), **presets[value]}

    return click.option(
        "--preset",
        type=click.Choice(list(presets)),
        is_eager=True,
        expose_value=False,
        callback=take,
        help="Sizes and recipe of an official model as defaults of the other options; give --batch and --epochs.",
    )
