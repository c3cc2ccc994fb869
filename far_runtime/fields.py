"""Sampling settings as a request's fields, for what speaks of them as options of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from far_runtime.errors import FarError


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
