"""Command-line options from the fields of settings dataclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from far_training.settings import Range

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Command = Callable[..., None]
Settings = TypeVar("Settings", bound="DataclassInstance")


def settings_options(*settings: DataclassInstance, **defaults: Any) -> Callable[[Command], Command]:
    """An option for every field with a help text; its default is in `defaults`, or else the value in `settings`.

    A field that several of the settings have becomes one option, with the default of the first.
    """
    options: dict[str, Callable[[Command], Command]] = {}
    for instance in settings:
        hints = get_type_hints(type(instance), include_extras=True)
        for field in option_fields(instance):
            default = defaults.get(field.name, getattr(instance, field.name))
            options.setdefault(field.name, _option(field, hints[field.name], default))

    def decorate(command: Command) -> Command:
        for option in reversed(options.values()):
            command = option(command)
        return command

    return decorate


def option_fields(settings: DataclassInstance) -> list[Field[Any]]:
    """The fields that are options."""
    return [field for field in fields(settings) if "help" in field.metadata]


def option_values(settings: DataclassInstance) -> dict[str, Any]:
    """Values of the fields that are options, by name."""
    return {field.name: getattr(settings, field.name) for field in option_fields(settings)}


def pop_settings(cls: type[Settings], values: dict[str, Any]) -> Settings:
    """Settings of a dataclass from the options' values, which are taken out of `values`."""
    return cls(**{field.name: values.pop(field.name) for field in fields(cls) if field.name in values})


def _option(field: Field[Any], hint: Any, default: Any) -> Callable[[Command], Command]:
    name = field.metadata["option"] or f"--{field.name.replace('_', '-')}"
    if NoneType in get_args(hint):  # Optional
        hint = get_args(hint)[0]
    texts = {"default": default, "show_default": True, "help": field.metadata["help"]}
    if hint is bool:
        return click.option(name, field.name, is_flag=True, **texts)
    return click.option(name, field.name, type=_value_type(hint), **texts)


def _value_type(hint: Any) -> click.ParamType:
    """A choice for a Literal, a range for an annotated number."""
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    number, limits = get_args(hint)
    assert isinstance(limits, Range)
    bounds: Any = (limits.low, limits.high, limits.low_open, limits.high_open)
    return click.IntRange(*bounds) if number is int else click.FloatRange(*bounds)
