"""The names of models in a server."""

from __future__ import annotations

import re

from far_runtime.errors import FarError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What can stand in an address and be the name of a folder."""


def check_name(name: str, how: str) -> None:
    """FarError for a name that cannot stand in an address or be the name of a folder.

    how: the text at the end of the error, which says how the user gives another name.
    """
    if not NAME.fullmatch(name):
        raise FarError(
            f"{name!r} cannot be a model's name; give one of at most 100 letters, digits, . _ -, with a letter or "
            "digit first: ",
            how,
        )
