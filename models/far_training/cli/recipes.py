"""Official training recipes as defaults of a command's options: --preset far-b."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

Recipe = Mapping[str, Any]

RECIPE: Recipe = {
    "batch": 2048,
    "epochs": 400,
    "blr": 1e-4,
    "warmup_epochs": 100,
    "schedule": "constant",
    "weight_decay": 0.02,
    "beta2": 0.95,
    "clip": 3.0,
    "ema": 0.9999,
    "ema_ramped": False,
    "draws": 4,
    "latent_scale": 0.2325,
    "prediction": "epsilon",
    "learned_variance": True,
    "input_noise": 0.0,
    "flip": 0.5,
    "flip_until": 1.0,
}
"""What FAR, MAR and FAR-T2I have in common: train.sh and main_far.py of FAR, README and main_mar.py of MAR."""

OF_CLASSES: Recipe = {**RECIPE, "buffer": 64, "label_drop": 0.1, "dropout": 0.1}
OF_LEVELS: Recipe = {"simplify": True, "weight_levels": True, "low": 0.0}
FAR_RECIPE: Recipe = {**OF_CLASSES, **OF_LEVELS, "mask": "off", "filter": "spatial", "levels": "batch"}
MAR_RECIPE: Recipe = {**OF_CLASSES, "epochs": 800, "mask_least": 0.7}
T2I_RECIPE: Recipe = {**RECIPE, **OF_LEVELS, "clip": 1.0, "ema": 0.999, "mask_least": 0.7, "text_drop": 0.1}

VAR_RECIPE: Recipe = {
    "schedule": "linear",
    "weight_decay": 0.05,
    "beta2": 0.95,
    "clip": 2.0,
    "ema": 0.0,
    "ema_ramped": False,
    "label_drop": 0.1,
    "smoothing": 0.0,
    "flip": 0.0,
    "flip_until": 1.0,
}
"""VAR's arg_util.py and README. There is no average of the weights. Warm-up: a fiftieth of the epochs."""


def var_recipe(depth: int, batch: int, epochs: int, blr: float, gain: float, end: float, decay: float) -> Recipe:
    """VAR's recipe of a depth. gain: of the branches' first scale. end: of the rate and (decay) of the weight decay."""
    sizes = {"model": f"var_d{depth}", "drop_path": 0.1 * depth / 24, "gain": gain}
    loop = {"batch": batch, "epochs": epochs, "warmup_epochs": epochs / 50, "blr": blr}
    return {**VAR_RECIPE, **sizes, **loop, "lr_end": end, "weight_decay_end": decay}


SIZES = {"b": "base", "l": "large", "h": "huge"}
FAR_PRESETS = {f"far-{size}": {**FAR_RECIPE, "model": f"far_{name}"} for size, name in SIZES.items()}
MAR_PRESETS = {f"mar-{size}": {**MAR_RECIPE, "model": f"mar_{name}"} for size, name in SIZES.items()}
T2I_PRESETS = {"far-t2i": {**T2I_RECIPE, "width": 1024, "depth": 16, "heads": 16, "head_width": 1024, "head_depth": 3}}
VAR_PRESETS = {
    "var-d16": var_recipe(16, 768, 200, 1e-4, 1e-3, 0.1, 0.05),
    "var-d20": var_recipe(20, 768, 250, 1e-4, 1e-3, 0.1, 0.05),
    "var-d24": var_recipe(24, 768, 350, 8e-5, 1e-4, 0.01, 0.05),
    "var-d30": var_recipe(30, 1024, 350, 8e-5, 1e-5, 0.01, 0.08),
    "var-d36": var_recipe(36, 768, 350, 8e-5, 5e-6, 0.01, 0.08),
}


def preset_option(presets: Mapping[str, Recipe]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
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
        help="Sizes and recipe of an official model as defaults of the other options.",
    )
