"""The folder that a bundle is exported to, and whether it may be replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from far_runtime.bundle import ENGINES_FOLDER, MANIFEST
from far_runtime.engines.cache.entry import is_cache_file
from far_runtime.errors import FarError
from far_runtime.storage.atomic import check_folder, resolved


def check_target(target: Path) -> None:
    """FarError unless a bundle can be written to `target`.

    The target is absent or empty, or holds an older bundle and nothing else; the folder around it is writable; and it
    is neither the current folder nor one around that.
    """
    target = resolved(target)
    here = Path.cwd().resolve()
    if target == here or target in here.parents:
        raise FarError(f"{target}: is the current folder or one around it, and stays; give -o a folder of its own")
    check_replaceable(target)
    check_folder(target.parent)


def check_replaceable(target: Path) -> None:
    """FarError where `target` holds files that do not belong to a bundle."""
    if target.exists() and not target.is_dir():
        raise FarError(f"{target}: is a file; -o needs a folder")
    foreign = _foreign_file(target) if target.is_dir() else None
    if foreign is not None:
        raise FarError(f"{target}: holds files that are no bundle ({foreign}, say), and they stay; give -o another")


def _foreign_file(folder: Path) -> str | None:
    """The first file in a folder that does not belong to its bundle, None where there is none. The bundle may be of any
    format, and lack files."""
    names = _manifest_files(folder)
    if names is None:
        return next((path.name for path in sorted(folder.iterdir())), None)
    files = {folder / name for name in (MANIFEST, *names)}
    folders = {parent for path in files for parent in path.parents}
    for path in sorted(folder.rglob("*")):
        top, *inside = path.relative_to(folder).parts
        # Engines were compiled from the bundle and go with it.
        if top == ENGINES_FOLDER and (not inside or is_cache_file(inside[0])):
            continue
        is_folder = path.is_dir() and not path.is_symlink()
        if path not in (folders if is_folder else files):
            return str(path.relative_to(folder))
    return None


def _manifest_files(folder: Path) -> list[str] | None:
    """The files that the folder's manifest lists; None where there is no bundle's manifest."""
    try:
        data: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or type(data.get("format")) is not int or not isinstance(data.get("files"), dict):
        return None
    return list(data["files"])
