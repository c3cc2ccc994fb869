"""Official training recipes, which --preset takes as the defaults of a command's other options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from far_training.cli.settings_options import option_values
from far_training.loop.settings import LoopSettings
from far_training.systems.settings import FARLossSettings, FART2ILossSettings, MARLossSettings, VARLossSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Recipe:
    """How an official model was trained."""

    loop: LoopSettings
    loss: DataclassInstance
    """The loss settings of its system."""
    model: Mapping[str, int | float | str]
    """Options of the command that set the model's sizes, by parameter name."""

    def defaults(self) -> dict[str, Any]:
        """Defaults of the command's options, by parameter name."""
        values = {**option_values(self.loop), **option_values(self.loss), **self.model}
        return {name: value for name, value in values.items() if value is not None}


# main_far.py and train.sh of FAR; main_mar.py and README of MAR
LOOP = LoopSettings(
    batch=2048,
    epochs=400,
    blr=1e-4,
    warmup_epochs=100,
    schedule="constant",
    weight_decay=0.02,
    beta2=0.95,
    clip=3.0,
    ema=0.9999,
    ema_ramped=False,
)
LATENTS: Mapping[str, int | float | str] = {"latent_scale": 0.2325, "prediction": "epsilon"}
FAR_MODEL = {**LATENTS, "buffer": 64, "filter": "spatial", "levels": "batch"}
MAR_MODEL = {**LATENTS, "buffer": 64}
T2I_MODEL = {**LATENTS, "width": 1024, "depth": 16, "heads": 16, "head_width": 1024, "head_depth": 3}

# arg_util.py and README of VAR, which does not average the weights
VAR_LOOP = LoopSettings(schedule="linear", weight_decay=0.05, beta2=0.95, clip=2.0, ema=0.0, ema_ramped=False)


def var_recipe(
    depth: int,
    batch: int = 768,
    epochs: int = 350,
    blr: float = 8e-5,
    gain: float = 1e-5,
    lr_end: float = 0.01,
    weight_decay_end: float = 0.05,
) -> Recipe:
    """VAR's recipe for a model of this depth, with a warm-up of a fiftieth of the epochs; see the settings' fields."""
    loop = replace(
        VAR_LOOP,
        batch=batch,
        epochs=epochs,
        blr=blr,
        warmup_epochs=epochs / 50,
        lr_end=lr_end,
        weight_decay_end=weight_decay_end,
    )
    loss = VARLossSettings(flip=0.0, drop_path=0.1 * depth / 24, gain=gain)
    return Recipe(loop, loss, {"model": f"var_d{depth}"})


SIZES = {"b": "base", "l": "large", "h": "huge"}
FAR_PRESETS = {
    f"far-{size}": Recipe(LOOP, FARLossSettings(), {**FAR_MODEL, "model": f"far_{name}"})
    for size, name in SIZES.items()
}
MAR_PRESETS = {
    f"mar-{size}": Recipe(replace(LOOP, epochs=800), MARLossSettings(), {**MAR_MODEL, "model": f"mar_{name}"})
    for size, name in SIZES.items()
}
T2I_PRESETS = {"far-t2i": Recipe(replace(LOOP, clip=1.0, ema=0.999), FART2ILossSettings(), T2I_MODEL)}
VAR_PRESETS = {
    "var-d16": var_recipe(16, epochs=200, blr=1e-4, gain=1e-3, lr_end=0.1),
    "var-d20": var_recipe(20, epochs=250, blr=1e-4, gain=1e-3, lr_end=0.1),
    "var-d24": var_recipe(24, gain=1e-4),
    "var-d30": var_recipe(30, batch=1024, weight_decay_end=0.08),
    "var-d36": var_recipe(36, gain=5e-6, weight_decay_end=0.08),
}


def preset_option(presets: Mapping[str, Recipe]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--preset, whose values take the place of the options' defaults; an option on the command line stays."""

    def set_defaults(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.default_map = {**(context.default_map or {}), **presets[value].defaults()}

    return click.option(
        "--preset",
        type=click.Choice(list(presets)),
        is_eager=True,
        expose_value=False,
        callback=set_defaults,
        help="An official model, whose sizes and training recipe become the defaults of the other options.",
    )
