"""A folder that appears whole or not at all, and what earlier attempts left beside it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from far_runtime.bundle import MANIFEST
from far_runtime.errors import FarError


def check_target(target: Path) -> None:
    """FarError unless a bundle can be written to `target`: absent, empty, or an older bundle, in a folder that is
    writable."""
    if target.exists() and not target.is_dir():
        raise FarError(f"{target}: is a file; -o needs a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise FarError(f"{target}: holds files that are no bundle, and they stay; give -o another folder")
    parent = target.absolute().parent
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
    process that was killed left beside `target` is cleared first.
    """
    parent = target.absolute().parent
    clear_leftovers(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}-", suffix=".part", dir=parent))
    old = folder.with_suffix(".old")
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        if target.exists():
            target.rename(old)
        try:
            folder.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(path.stat().st_size for path in folder.iterdir()) >> 20
            raise FarError(
                f"{parent}: the disk is full after {needed} MB; free some space or give -o a folder elsewhere"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(target: Path) -> None:
    """Remove unfinished folders of processes that are gone; an old bundle that one had just moved aside comes back."""
    for path in target.absolute().parent.glob(f".{target.name}.*"):
        found = re.fullmatch(r"(\d+)-\w+\.(part|old)", path.name[len(target.name) + 2 :])
        if found is None or _alive(int(found[1])):
            continue
        if found[2] == "old" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
