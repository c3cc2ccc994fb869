"""A folder that appears whole or not at all, and what earlier attempts left beside it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from far_runtime.bundle import ENGINES_FOLDER, MANIFEST
from far_runtime.engines.cache.entry import is_cache_file
from far_runtime.errors import FarError
from far_runtime.storage.atomic import resolved


def check_target(target: Path) -> None:
    """FarError unless a bundle can be written to `target`: absent, empty, or an older bundle and nothing else, in a
    folder that is writable; never the current folder or one around it."""
    target = resolved(target)
    here = Path.cwd().resolve()
    if target == here or target in here.parents:
        raise FarError(f"{target}: is the current folder or one around it, and stays; give -o a folder of its own")
    check_replaceable(target)
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise FarError(f"{parent}: cannot be written ({error.strerror}); give -o another folder") from error


def check_replaceable(target: Path) -> None:
    """FarError unless nothing would be lost with `target` but a bundle."""
    if target.exists() and not target.is_dir():
        raise FarError(f"{target}: is a file; -o needs a folder")
    foreign = _foreign(target) if target.is_dir() else None
    if foreign is not None:
        raise FarError(f"{target}: holds files that are no bundle ({foreign}, say), and they stay; give -o another")


def _foreign(folder: Path) -> str | None:
    """One of the files that do not belong to the bundle in a folder, or None. A bundle of another format or with files
    missing is one, too."""
    files = _listed(folder)
    if files is None:
        return next((path.name for path in sorted(folder.iterdir())), None)
    own = {folder / name for name in (MANIFEST, *files)}
    around = {parent for path in own for parent in path.parents}
    for path in sorted(folder.rglob("*")):
        top, *inside = path.relative_to(folder).parts
        if top == ENGINES_FOLDER and (
            not inside or is_cache_file(inside[0])
        ):  # compiled from the bundle, worthless without
            continue
        is_folder = path.is_dir() and not path.is_symlink()
        if path not in (around if is_folder else own):
            return str(path.relative_to(folder))
    return None


def _listed(folder: Path) -> list[str] | None:
    """The files that the folder's manifest lists; None where there is no manifest of ours."""
    try:
        data: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or type(data.get("format")) is not int or not isinstance(data.get("files"), dict):
        return None
    return list(data["files"])
