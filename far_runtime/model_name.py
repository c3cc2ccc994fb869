"""Names by which servers know models."""

from __future__ import annotations

import re

from far_runtime.errors import FarError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str, how: str) -> None:
    """FarError for a name that does not fit an address or a folder. how: the user gives another one."""
    if not NAME.fullmatch(name):
        raise FarError(
            f"{name!r} cannot be a model's name; give one of at most 100 letters, digits, . _ -, with a letter or "
            "digit first: ",
            how,
        )
