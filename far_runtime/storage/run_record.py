"""A folder that is filled bit by bit says in a file what of, so that nothing else is put beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from far_runtime.errors import FarError, SettingName
from far_runtime.storage.atomic import whole_file


def claim(path: Path, facts: Mapping[str, Any]) -> None:
    """Write down what the folder of `path` is filled with; FarError where it is written there already, and differs."""
    if not check_claim(path, facts):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as aside:
            aside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def check_claim(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether it is written there already; FarError where something else is."""
    before = read(path)
    if before is None:
        return False
    now = json.loads(json.dumps(facts))
    if before != now:
        changed = [
            f"{key} {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        raise FarError(
            f"{path.parent}: holds pictures of another run ({'; '.join(changed)}); give the same settings or "
            "choose another ",
            SettingName("output"),
            " folder",
        )
    return True


def read(path: Path) -> dict[str, Any] | None:
    """What is written there; None where nothing is. FarError for a file that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FarError(
            f"{path}: cannot be read ({error}); remove {path.parent} or choose another ", SettingName("output")
        ) from error
    return found
