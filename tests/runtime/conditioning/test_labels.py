"""Labels by number, by name and by part of a name."""

from __future__ import annotations

import pytest

from far_runtime.conditioning.labels import resolve_label
from far_runtime.errors import FarError

NAMES = ("crane", "red fox", "fox terrier", "Crane", "dragonfly", "house cat", "cat", "7 up", "Straße")


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (0, 0), ("8", 8), (" 3 ", 3), ("red fox", 1), ("RED FOX", 1), ("terrier", 2), ("dragon", 4), ("cat", 6),
        ("house", 5), ("up", 7), ("STRASSE", 8),
    ],
)  # fmt: skip
def test_numbers_and_names(given: int | str, label: int) -> None:
    assert resolve_label(given, len(NAMES), NAMES) == label


@pytest.mark.parametrize("number", [-1, 9, "9", "-1", 10**30])
def test_out_of_range_says_the_range(number: int | str) -> None:
    with pytest.raises(FarError, match=f"label {number}: out of range; this bundle has classes 0 to 8"):
        resolve_label(number, len(NAMES), NAMES)


def test_ambiguous_names_list_what_fits() -> None:
    with pytest.raises(FarError, match=r"'fox': 2 classes fit \(1 red fox, 2 fox terrier\); .*label 1, say"):
        resolve_label("fox", len(NAMES), NAMES)
    with pytest.raises(FarError, match=r"'crane': 2 classes fit \(0 crane, 3 Crane\)"):
        resolve_label("crane", len(NAMES), NAMES)


def test_unknown_names_list_the_closest() -> None:
    with pytest.raises(FarError, match=r"'dragonfry': no class of that name; the closest are 4 dragonfly"):
        resolve_label("dragonfry", len(NAMES), NAMES)
    with pytest.raises(FarError, match="none comes close"):
        resolve_label("quintessence", len(NAMES), NAMES)
    with pytest.raises(FarError, match="no class of that name"):
        resolve_label("", len(NAMES), NAMES)


def test_a_bundle_without_names_wants_numbers() -> None:
    assert resolve_label("3", 10) == 3
    with pytest.raises(FarError, match="no class names; use label with a number, 0 to 9"):
        resolve_label("fox", 10)
