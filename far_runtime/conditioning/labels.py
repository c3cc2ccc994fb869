"""Class labels by number or by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from far_runtime.errors import FarError, SettingName

SHOWN = 5
"""Classes that a message lists."""


def resolve_label(label: int | str, count: int, names: Sequence[str] = ()) -> int:
    """The number, 0 to count - 1, of a label that is a number or a class name.

    A name has to be equal to the name of a class, or part of the name of exactly one class; upper and lower case are
    the same. Raises FarError for a number out of range, and for an unknown or ambiguous name; the error lists the
    classes that come closest.
    """
    text = str(label).strip()
    try:
        number = int(text)
    except ValueError:
        return _by_name(text, names, count)
    if not 0 <= number < count:
        raise FarError(
            f"label {number}: out of range; this bundle has classes 0 to {count - 1}; use ",
            SettingName("label"),
            " with one of them",
        )
    return number


def _by_name(text: str, names: Sequence[str], count: int) -> int:
    if not names:
        raise FarError(
            f"label {text!r}: this bundle has no class names; use ",
            SettingName("label"),
            f" with a number, 0 to {count - 1}",
        )
    folded, query = [name.casefold() for name in names], text.casefold()
    matches = [i for i, name in enumerate(folded) if name == query]
    if not matches and query:
        matches = [i for i, name in enumerate(folded) if query in name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        close = sorted(matches, key=lambda i: -difflib.SequenceMatcher(None, query, folded[i]).ratio())
        raise FarError(
            f"label {text!r}: {len(matches)} classes fit ({_listed(close, names)}); use the number of one: ",
            SettingName("label"),
            f" {close[0]}, say",
        )
    close = [folded.index(name) for name in difflib.get_close_matches(query, folded, SHOWN, cutoff=0.5)]
    hint = f"the closest are {_listed(close, names)}" if close else "none comes close; far inspect lists them"
    raise FarError(
        f"label {text!r}: no class of that name; {hint}; use ",
        SettingName("label"),
        f" with a name or a number, 0 to {count - 1}",
    )


def _listed(labels: Sequence[int], names: Sequence[str]) -> str:
    shown = ", ".join(f"{i} {names[i]}" for i in labels[:SHOWN])
    return shown + (", ..." if len(labels) > SHOWN else "")
