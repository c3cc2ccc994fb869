"""The errors that users see: one line each, no traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class SettingName(str):
    """The name of a setting or option within a message, as Python has it: `batch_size`."""


Spelling = Callable[[str], str]
"""How a face of the program writes the name of a setting, such as "--batch-size" for "batch_size"."""


class Message(str):
    """A text for users that knows which of its parts are names of settings; as a string it has them as Python does."""

    parts: tuple[str, ...]
    """The pieces of the text in their order; names of settings are `SettingName`s."""

    def __new__(cls, *parts: str) -> Message:
        message = super().__new__(cls, "".join(parts))
        message.parts = tuple(
            piece for part in parts for piece in (part.parts if isinstance(part, Message) else [part])
        )
        return message

    def to_json(self) -> list[Any]:
        """Its parts as JSON, with [name] for the name of a setting."""
        return [[part] if isinstance(part, SettingName) else part for part in self.parts]

    @classmethod
    def from_json(cls, parts: list[Any]) -> Message:
        """A message from what `to_json` returned."""
        return cls(*(SettingName(part[0]) if isinstance(part, list) else part for part in parts))


def join_texts(texts: Iterable[str], separator: str) -> Message:
    """Texts joined by a separator, with the names of settings kept."""
    return Message(*[part for text in texts for part in (separator, text)][1:])


def spelled(text: str, spelling: Spelling) -> str:
    """A message with the names of its settings in a spelling; any other text unchanged."""
    if not isinstance(text, Message):
        return text
    return "".join(spelling(part) if isinstance(part, SettingName) else part for part in text.parts)


class FarError(Exception):
    """Bad input or surroundings: what was wrong, what was expected, what mends it; the command exits with 2.

    The text comes in parts. The name of a setting is a `SettingName`, which each face of the program spells in its own
    way: `FarError(SettingName("steps"), " 0: expected 1 to 1000")`.
    """

    def __init__(self, *parts: str) -> None:
        super().__init__(*parts)

    def __str__(self) -> str:
        return "".join(self.args)

    @property
    def message(self) -> Message:
        """Its text with the names of settings in it."""
        return Message(*self.args)


class NotFinite(FarError):
    """Numbers that ran out of range while a picture was drawn."""


class CheckFailed(FarError):
    """A check ran to its end and its answer is no; the command exits with 1."""
