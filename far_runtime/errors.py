"""The errors that users see: one line each, no traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FarError(Exception):
    """Bad input or surroundings: what was wrong, what was expected, what mends it; the command exits with 2."""


class NotFinite(FarError):
    """Numbers that ran out of range while a picture was drawn."""


class CheckFailed(FarError):
    """A check ran to its end and its answer is no; the command exits with 1."""


@contextmanager
def fields_for_options() -> Iterator[None]:
    """Errors that speak of the command line's options speak of the request's fields."""
    try:
        yield
    except FarError as error:
        text = re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), str(error))
        raise FarError(text) from error


def as_option(name: str, value: Any) -> Any:
    """A setting as the command line has it: lists of numbers separated by commas."""
    return ",".join(map(str, value)) if isinstance(value, list) and name != "levels" else value
