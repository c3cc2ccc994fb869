"""The errors that users see: one line each, no traceback."""

from __future__ import annotations


class FarError(Exception):
    """Bad input or surroundings: what was wrong, what was expected, what mends it; the command exits with 2."""


class NotFinite(FarError):
    """Numbers that ran out of range while a picture was drawn."""


class CheckFailed(FarError):
    """A check ran to its end and its answer is no; the command exits with 1."""
