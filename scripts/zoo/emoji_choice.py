"""Which emoji become classes, and which of their pictures are kept back from training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from emoji_match import Drawing, Emoji
from emoji_sources import hex_key
from far_runtime.errors import FarError

# A concept with fewer styles than this keeps them all for training.
LEAST_STYLES_TO_HOLD_OUT = 5


def read_curated(path: Path, emoji: Mapping[str, Emoji]) -> list[str]:
    """Keys of the curated list in its order; the first word of a line is the hexcode, the rest is a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = [hex_key(words[0]) for line in lines if (words := line.partition("#")[0].split())]
    wrong = [key for key in dict.fromkeys(keys) if key not in emoji or keys.count(key) > 1]
    if wrong:
        raise FarError(f"{path}: expected each known hexcode once; unknown or repeated: {', '.join(wrong)}")
    return keys


def choose_concepts(
    emoji: Mapping[str, Emoji],
    drawings: Mapping[str, Mapping[str, Drawing]],
    count: int | None,
    min_styles: int,
    curated: Sequence[str],
) -> list[str]:
    """Keys of the classes, in class order.

    With `count` None these are all emoji that have a drawing, in the order of emojibase. Otherwise curated ones come
    first, then emoji without gender by falling number of styles, each in at least `min_styles` styles.
    """
    styles_of = {key: sum(key in table for table in drawings.values()) for key in emoji}
    if count is None:
        return [key for key in emoji if styles_of[key]]
    fit = {key for key in emoji if styles_of[key] >= min_styles and emoji[key].base is None}
    first = [key for key in curated if key in fit]
    rest = sorted((key for key in emoji if key in fit.difference(first)), key=lambda key: -styles_of[key])
    chosen = [*first, *rest][:count]
    if len(chosen) < count:
        raise FarError(
            f"{len(chosen)} concepts have at least {min_styles} styles; expected {count}: "
            "lower --concepts or --min-styles, or give more --styles"
        )
    return chosen


def held_out_pairs(pairs: Sequence[tuple[str, str]], one_in: int) -> set[tuple[str, str]]:
    """(key, style) pairs to hold out: one style of about every `one_in`-th concept; 0 holds out none.

    Decided by hashes of names, so that sets of different sizes hold out the same pictures: an autoencoder trained on
    all emoji has not seen what a generator trained on some of them is tested with. Close relatives stay in training:
    the gendered forms of an emoji, and the flat and 3D drawings of Fluent.
    """
    styles: dict[str, list[str]] = {}
    for key, style in pairs:
        styles.setdefault(key, []).append(style)
    held = set()
    for key, present in styles.items():
        if one_in and len(present) >= LEAST_STYLES_TO_HOLD_OUT and rank(key) % one_in == 0:
            held.add((key, min(present, key=lambda style: rank(f"{key}/{style}"))))
    return held


def rank(text: str) -> int:
    """A number that depends on the text alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
