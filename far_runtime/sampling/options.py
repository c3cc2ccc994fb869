"""The sampling settings of all systems: one table, which the command line, the server, Triton and the loops read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from far_runtime.errors import FarError, SettingName
from far_runtime.model_info import ModelInfo


@dataclass(frozen=True)
class Setting:
    """A sampling setting: its name, the values that it takes, and the systems that have it."""

    name: str
    """Its name in Python and JSON."""
    help: str
    """Help text for the command line and the server's schema."""
    metavar: str
    """The form of its value in help texts, such as "N|A:B|N,N,..."."""
    type: type[int] | type[float] | type[bool] | type[str] = str
    """Type of its value. With `per_step` the value is a text, or else a number or a list."""
    official: dict[str, Any] = field(default_factory=dict)
    """The released code's value for each system that takes the setting. None: the loop derives it from the model. Where
    a number is too large for a model, the model's highest one is used instead."""
    lowest: float = -math.inf
    """The smallest number that is accepted."""
    highest: float | Callable[[Any], int] = math.inf
    """The largest number that is accepted, or a function of the model that returns it."""
    unit: str = ""
    """What the numbers count, as error messages add it to the range."""
    choices: tuple[str, ...] = ()
    """The texts that are accepted; empty: any."""
    per_step: bool = False
    """Whether it may have a value for each step of the loop; the loop checks such values."""
    changed_by: Literal["every preset", "tuned presets", "no preset"] = "every preset"
    """The presets, other than the official one, that may set it."""

    def resolve(self, value: Any, system: str, model: ModelInfo) -> Any:
        """A value as JSON has it; for None the official one. FarError for a wrong type or a number out of range."""
        highest = self.highest(model) if callable(self.highest) else self.highest
        official = self.official[system]
        if self.type in (int, float) and official is not None:
            official = min(official, highest)
        if value is None:
            return official
        if self.per_step:
            return value
        if self.type in (int, float):
            return self._number(value, highest, official)
        choices = self.choices or ("true", "false")
        if type(value) is not self.type or (self.choices and value not in choices):
            raise FarError(SettingName(self.name), f" {value}: expected {' or '.join(choices)}")
        return value

    def _number(self, value: Any, highest: float, official: float | None) -> float:
        try:
            number = float(value) if self.type is float else int(value)
            same = not isinstance(value, bool) and (isinstance(value, str) or number == value)
            if same and self.lowest <= number <= highest and math.isfinite(number):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        expected = "a whole number" if self.type is int else "a number"
        limits = f"from {self.lowest:g} to {highest:g}" if highest < math.inf else f"of {self.lowest:g} or more"
        advice = [] if official is None else ["; use ", SettingName(self.name), f" {official:g}, say"]
        raise FarError(SettingName(self.name), f" {value}: expected {expected} {limits}{self.unit}", *advice)


FAR = ("far", "far_t2i")
"""Systems that draw level by level."""

DIFFUSION = (*FAR, "mar")
"""Systems with a diffusion head."""

SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            name="preset",
            metavar="NAME",
            help="Named settings: official, quality, balanced or fast. The other settings override them. far tune "
            "finds the presets of a bundle.",
        ),
        Setting(
            name="levels",
            metavar="N,N,...",
            help="FAR: the frequency levels to draw, from low to high.",
            official=dict.fromkeys(FAR),
            per_step=True,
            changed_by="tuned presets",
        ),
        Setting(
            name="iterations",
            metavar="N",
            help="MAR: number of iterations, at most that of the tokens.",
            type=int,
            official={"mar": 64},
            lowest=1,
            highest=lambda model: int(model.tokens),
            unit=", the tokens of a picture",
            changed_by="tuned presets",
        ),
        Setting(
            name="steps",
            metavar="N|A:B|N,N,...",
            help="Diffusion steps: N at every level or iteration, from A at the first to B at the last, or one number "
            "for each.",
            official=dict.fromkeys(DIFFUSION, 100),
            per_step=True,
        ),
        Setting(
            name="solver",
            metavar="NAME|NAME,...",
            help="Diffusion solver of all levels or iterations, or one for each: ddpm (the official one), ddim, "
            "dpmpp-2m or dpmpp-2m-sde.",
            official=dict.fromkeys(DIFFUSION, "ddpm"),
            per_step=True,
        ),
        Setting(
            name="start",
            metavar="T",
            help="Timestep of the first diffusion step. Default: 999; for solvers other than ddpm, where the model "
            "predicts epsilon, 950.",
            type=int,
            official=dict.fromkeys(DIFFUSION),
            lowest=1,
            highest=999,
            unit=", the timestep of the first diffusion step",
        ),
        Setting(
            name="guidance",
            metavar="SCALE",
            help="Scale of classifier-free guidance; where it rises from step to step, its last value.",
            type=float,
            official={"far": 3.0, "far_t2i": 3.0, "mar": 2.9, "var": 1.5},
            lowest=0,
            changed_by="no preset",
        ),
        Setting(
            name="guidance_floor",
            metavar="SCALE",
            help="Steps whose guidance is not above this run without guidance, at half the cost. Default: 1.",
            type=float,
            official=dict.fromkeys(DIFFUSION, 1.0),
            lowest=0,
        ),
        Setting(
            name="temperature",
            metavar="T",
            help="Factor of the noise that the sampler adds.",
            type=float,
            official=dict.fromkeys(DIFFUSION, 1.0),
            lowest=0,
            changed_by="no preset",
        ),
        Setting(
            name="shared_noise",
            metavar="LEVEL",
            help="FAR: at levels below this one all tokens of a picture share their noise. 1 is for models that were "
            "trained with --first mean. Default: the model's, or 0.",
            type=int,
            official=dict.fromkeys(FAR, 0),
            lowest=0,
            highest=lambda model: int(model.grid),
            unit=", the levels of the grid",
            changed_by="no preset",
        ),
        Setting(
            name="guidance_schedule",
            metavar="linear|constant",
            help="MAR: whether guidance rises with the share of tokens that are drawn (linear) or stays the same "
            "(constant).",
            official={"mar": "linear"},
            choices=("linear", "constant"),
            changed_by="no preset",
        ),
        Setting(
            name="top_k",
            metavar="N",
            help="VAR: draw from the N likeliest tokens; 0: from all.",
            type=int,
            official={"var": 900},
            lowest=0,
            highest=lambda model: int(model.vocabulary),
            unit=", the tokens of the vocabulary",
            changed_by="no preset",
        ),
        Setting(
            name="top_p",
            metavar="P",
            help="VAR: draw from the likeliest tokens whose probabilities add up to P; 0: from all.",
            type=float,
            official={"var": 0.96},
            lowest=0,
            highest=1,
            changed_by="no preset",
        ),
        Setting(
            name="more_smooth",
            metavar="true|false",
            help="VAR: mix the embeddings of several tokens, for smoother pictures.",
            type=bool,
            official={"var": False},
            changed_by="no preset",
        ),
    )
}
"""All settings of all systems, and the preset, in the order of help texts and records."""


def settings_of(system: str) -> tuple[str, ...]:
    """The names of the settings that a system takes."""
    return tuple(name for name, setting in SETTINGS.items() if system in setting.official)


def resolve_values(system: str, model: ModelInfo, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a system by name: the overrides, and the official values for those that are missing or None.

    Values of settings with `per_step` are returned unchanged. FarError for a wrong type or a number out of range.
    """
    return {name: SETTINGS[name].resolve(overrides.get(name), system, model) for name in settings_of(system)}
