"""A folder that appears whole or not at all, and what earlier attempts left beside it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from far_runtime.bundle import ENGINES_FOLDER, MANIFEST
from far_runtime.engines.cache.entry import belongs
from far_runtime.errors import FarError
from far_runtime.storage.atomic import process_lives


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


@contextlib.contextmanager
def folder_put_in_place(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end of the block, or vanishes if the block raises.

    A full disk becomes a FarError. What stood at `target` before is there untouched until the replacement. What a
    process that was killed left beside `target` is cleared first. Where `target` is a link, the folder that it leads
    to is replaced.
    """
    target = resolved(target)
    parent = target.parent
    clear_leftovers(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}-", suffix=".part", dir=parent))
    old = folder.with_suffix(".old")
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        check_replaceable(target)  # once more: somebody may have put files there in the meantime
        _replace(folder, target, old)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(path.stat().st_size for path in folder.iterdir()) >> 20
            raise FarError(
                f"{parent}: the disk is full after {needed} MB; free some space or give -o a folder elsewhere"
            ) from error
        raise
    finally:
        if old.exists() and not target.exists():  # interrupted between the two renames
            with contextlib.suppress(OSError):  # another process was faster
                old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _replace(folder: Path, target: Path, old: Path) -> None:
    """Put `folder` at `target`, and what was there at `old`; FarError where another process does the same now."""
    try:
        if target.exists():
            target.rename(old)
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FarError(
            f"{target}: another process has put a bundle there at the same moment, and that one stays; export again, "
            "or give -o another folder"
        ) from error


def resolved(target: Path) -> Path:
    """The folder that a path leads to, by its full name; FarError for links in a circle."""
    try:
        return target.resolve()
    except (OSError, RuntimeError) as error:
        raise FarError(f"{target}: leads nowhere ({error}); give -o another folder") from error


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
        if top == ENGINES_FOLDER and (not inside or belongs(inside[0])):  # compiled from the bundle, worthless without
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


def clear_leftovers(target: Path) -> None:
    """Remove unfinished folders of processes that are gone; an old bundle that one had just moved aside comes back."""
    for path in target.absolute().parent.iterdir():
        found = re.fullmatch(rf"\.{re.escape(target.name)}\.(\d+)-\w+\.(part|old)", path.name)
        if found is None or process_lives(int(found[1])):
            continue
        if found[2] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
