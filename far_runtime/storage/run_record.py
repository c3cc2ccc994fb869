"""The record of what a folder is filled with, so that a run that was ended can go on and another one cannot mix in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from far_runtime.errors import FarError, SettingName
from far_runtime.storage.atomic import whole_file


def claim(path: Path, facts: Mapping[str, Any]) -> None:
    """Record in the file `path` what its folder is filled with; FarError where it was begun with other facts."""
    if not check_claim(path, facts):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as aside:
            aside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def check_claim(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether the folder of the file `path` was begun with these facts; FarError where it was begun with others."""
    before = read(path)
    if before is None:
        return False
    now = json.loads(json.dumps(facts))
    if before != now:
        raise FarError(
            f"{path.parent}: was begun with other settings ({'; '.join(differences(before, now))}); give the same "
            "ones, remove it or choose another ",
            SettingName("output"),
            " folder",
        )
    return True


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two records: "key before -> now"."""
    return [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def digest_of(facts: Mapping[str, Any], digits: int = 16) -> str:
    """The first hex digits of SHA-256 over the JSON of a record, keys sorted: a name for what depends on it."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:digits]


def read(path: Path) -> dict[str, Any] | None:
    """The facts in a record; None where there is no such file. FarError for a damaged one."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FarError(
            f"{path}: cannot be read ({error}); remove {path.parent} or choose another ", SettingName("output")
        ) from error
    return facts
