"""The names of settings as the command line spells them."""

from __future__ import annotations

from far_runtime.errors import FarError, spelled


def option(name: str) -> str:
    """The option of a setting: "--batch-size" for "batch_size"."""
    return "-o" if name == "output" else "--" + name.replace("_", "-")


def with_options(text: str | FarError) -> str:
    """A message, or the text of an error, with the names of settings spelled as options."""
    return spelled(text.message if isinstance(text, FarError) else text, option)
