"""Settings that state their range and their meaning, from which the command line makes its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may take."""

    low: float
    high: float | None = None
    low_open: bool = False
    """Whether `low` itself is excluded."""
    high_open: bool = False
    """Whether `high` itself is excluded."""


Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, high_open=True)]
Amount = Annotated[float, Range(0)]
Factor = Annotated[float, Range(0, low_open=True)]
Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]


def setting(default: Any, help: str, option: str | None = None) -> Any:
    """A dataclass field that is an option of a command too. option: its spelling, where the field's name is not it."""
    return field(default=default, metadata={"help": help, "option": option})
