"""Matches drawings to emoji by CLDR labels, Unicode names, tables of iconify, and a list of odd names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoji_sources import hex_key, read_members, slug, unicode_name
from far_runtime.errors import FarError

# Groups of emojibase-data that are no pictures to learn: skin tones and hair (2) and flags (9).
LEFT_OUT_GROUPS = (2, 9)
GENDER_SIGNS = ("2640", "2642")


@dataclass(frozen=True)
class Emoji:
    """One concept."""

    key: str
    """Its hexcode as `hex_key` spells it."""

    char: str
    """The character itself."""

    label: str
    """Its CLDR label."""

    tags: tuple[str, ...]
    group: str
    subgroup: str

    base: str | None
    """Key of its form without gender; None if there is none or this is it."""


@dataclass(frozen=True)
class Drawing:
    """The source of one picture."""

    data: bytes
    """SVG text, or a bitmap file."""

    kind: str
    """Either "svg" or "bitmap"."""

    mirrored: bool = False
    """Whether the picture is mirrored."""


def read_emoji(tarball: Path) -> dict[str, Emoji]:
    """Emoji of emojibase-data by key, in its order, without flags, components and skin tones."""
    files = read_members(tarball, ["en/data.json", "meta/groups.json"])
    meta = json.loads(files["meta/groups.json"])
    rows = [row for row in json.loads(files["en/data.json"]) if row.get("group") not in (None, *LEFT_OUT_GROUPS)]
    keys = {hex_key(row["hexcode"]) for row in rows}
    found = {}
    for row in sorted(rows, key=lambda row: row["order"]):
        key = hex_key(row["hexcode"])
        found[key] = Emoji(
            key,
            row["emoji"],
            row["label"],
            tuple(row.get("tags", ())),
            meta["groups"][str(row["group"])],
            meta["subgroups"][str(row["subgroup"])],
            genderless(key, keys),
        )
    return found


def genderless(key: str, keys: set[str]) -> str | None:
    """Key of the form without a gender sign, or with a person instead of a man or woman; None if there is none."""
    parts = key.split("-200d-")
    if len(parts) > 1 and parts[-1] in GENDER_SIGNS and "-200d-".join(parts[:-1]) in keys:
        return "-200d-".join(parts[:-1])
    if len(parts) > 1 and parts[0] in ("1f468", "1f469"):
        person = "-200d-".join(["1f9d1", *parts[1:]])
        return person if person in keys else None
    return None


def read_odd_names(path: Path) -> dict[str, dict[str, str]]:
    """Style -> icon name -> key ('-' for an icon to leave out)."""
    table: dict[str, dict[str, str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if words and len(words) != 3:
            raise FarError(f"{path}:{number}: expected 'style name hexcode', found {line.strip()!r}")
        if words:
            table.setdefault(words[0], {})[words[1]] = words[2]
    return table


def name_table(emoji: dict[str, Emoji], first: str = "label") -> dict[str, str]:
    """Slug of a name -> key, from CLDR labels and Unicode names; `first` wins: 'label' or 'unicode'."""
    by_label = {slug(one.label): one.key for one in emoji.values()}
    by_unicode = {slug(name): key for key in emoji if "-" not in key and (name := unicode_name(key))}
    for table in (by_label, by_unicode):
        # "keycap: #" and "keycap: *" have one slug
        table.pop("keycap", None)
    return {**by_unicode, **by_label} if first == "label" else {**by_label, **by_unicode}


def iconify_aliases(icons: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Alias -> (icon, mirrored), chains followed; aliases that turn the picture are left out."""
    found = {}
    table = icons.get("aliases", {})
    for alias in table:
        name, mirrored, steps = alias, False, 0
        while name in table and steps < 8:
            entry = table[name]
            if entry.get("rotate") or entry.get("vFlip"):
                break
            mirrored ^= bool(entry.get("hFlip"))
            name, steps = entry["parent"], steps + 1
        if name in icons["icons"]:
            found[alias] = (name, mirrored)
    return found


def svg_text(icons: dict[str, Any], name: str) -> str:
    """A whole SVG document of one iconify icon; its view box keeps the icon's own proportions."""
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def iconify_drawings(
    tarball: Path, emoji: dict[str, Emoji], other_names: dict[str, str], odd: dict[str, str], first: str = "label"
) -> dict[str, Drawing]:
    """Drawings of an iconify package by emoji key.

    A package with a table of characters (chars.json) is believed. One without is matched by names: the odd ones,
    then CLDR labels and Unicode names, then what other packages call an emoji.
    """
    files = read_members(tarball, ["icons.json", "chars.json"])
    icons = json.loads(files["icons.json"])
    aliases = iconify_aliases(icons)
    where = {**{name: (name, False) for name in icons["icons"]}, **aliases}
    chosen: dict[str, str] = {}
    for code, name in json.loads(files["chars.json"]).items():
        if name in where and odd.get(name) != "-":
            chosen.setdefault(hex_key(code), name)
    if not chosen:
        # the best explanation of a name first, so that no alias takes a place from a plain name
        for table in (odd, name_table(emoji, first), other_names):
            for name in where:
                key = table.get(name if table is odd else slug(name))
                if key and key != "-" and key not in chosen and (table is odd or name not in odd):
                    chosen[key] = name
    drawings = {}
    for key, name in chosen.items():
        if key in emoji:
            icon, mirrored = where[name]
            drawings[key] = Drawing(svg_text(icons, icon).encode(), "svg", mirrored)
    return drawings


def iconify_names(tarball: Path) -> Iterator[tuple[str, str]]:
    """(slug of a name, key) of a package that has a table of characters, aliases that do not mirror included."""
    files = read_members(tarball, ["icons.json", "chars.json"])
    icons, chars = json.loads(files["icons.json"]), json.loads(files["chars.json"])
    by_name = {name: hex_key(code) for code, name in chars.items()}
    for name, key in by_name.items():
        yield slug(name), key
    for alias, (name, mirrored) in iconify_aliases(icons).items():
        if name in by_name and not mirrored:
            yield slug(alias), by_name[name]


def bitmap_drawings(tarball: Path, emoji: dict[str, Emoji]) -> dict[str, Drawing]:
    """Drawings of a package of bitmaps named by hexcode."""
    found = {}
    for name, data in read_members(tarball, suffix=".webp").items():
        key = hex_key(Path(name).stem)
        if key in emoji:
            found[key] = Drawing(data, "bitmap")
    return found
