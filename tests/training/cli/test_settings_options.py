"""Options that are made from the fields of a settings dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from far_training.cli.main import train
from far_training.cli.settings_options import option_values, pop_settings, settings_options
from far_training.settings import Factor, Positive, Share, setting


@dataclass(frozen=True)
class Oven:
    """How to bake."""

    heat: Factor = setting(180.0, "Degrees.")
    loaves: Positive | None = setting(None, "Most loaves.")
    part: Share = setting(0.5, "Share of rye.")
    crust: Literal["soft", "hard"] = setting("soft", "The crust.")
    steam: bool = setting(False, "Let steam in.")
    fan: bool = setting(True, "Blow.", "--fan/--still")
    inside: int = 3
    """No option."""


@dataclass(frozen=True)
class Grill:
    heat: Factor = setting(250.0, "Degrees.")
    coal: Share = setting(1.0, "Share of coal.")


def bake(*arguments: str, settings: tuple[Any, ...] = (Oven(),), **defaults: Any) -> tuple[str, dict[str, Any]]:
    """What is printed, and the values that the command gets."""
    values: dict[str, Any] = {}

    @click.command()
    @settings_options(*settings, **defaults)
    def command(**options: Any) -> None:
        values.update(options)

    return CliRunner().invoke(command, list(arguments)).output, values


def test_defaults_are_those_of_the_settings() -> None:
    _, values = bake(settings=(Oven(heat=200.0, crust="hard"),))
    assert pop_settings(Oven, values) == Oven(heat=200.0, crust="hard") and not values
    assert "inside" not in option_values(Oven())


def test_options_set_the_fields() -> None:
    line = ("--heat", "220", "--loaves", "4", "--part", "1", "--crust", "hard", "--steam", "--still")
    _, values = bake(*line)
    chosen = Oven(heat=220.0, loaves=4, part=1.0, crust="hard", steam=True, fan=False)
    assert pop_settings(Oven, values | {"other": 1}) == chosen


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--heat", "0", "x>0"),
        ("--loaves", "0", "x>=1"),
        ("--loaves", "1.5", "not a valid integer"),
        ("--part", "1.1", "0<=x<=1"),
        ("--crust", "burnt", "'soft', 'hard'"),
    ],
)
def test_values_out_of_range_are_refused(option: str, value: str, message: str) -> None:
    assert message in bake(option, value)[0]


def test_a_field_of_two_settings_is_one_option() -> None:
    _, values = bake(settings=(Oven(), Grill()), part=None)
    assert (values["heat"], values["coal"], values["part"]) == (180.0, 1.0, None)


def test_every_option_has_a_help_text() -> None:
    for name, command in train.commands.items():
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        assert all(option.help for option in options), name
        assert len({option.name for option in options}) == len(options), name
