"""A lock between processes that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

POLL_SECONDS = 0.2


@contextlib.contextmanager
def held(path: Path, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path` within the block; where another process holds it, call `waits` once and wait.

    The kernel releases the lock when its process ends, however it ends (flock; on Windows msvcrt.locking, which polls):
    a file that was left behind locks nothing. The file is removed at the end. OSError where it cannot be created.
    """
    with _locked(path, waits):
        yield


@contextlib.contextmanager
def held_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` within the block if no other process does; yields whether it is held."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(path, None))
            free = True
        except BlockingIOError:
            free = False
        yield free


@contextlib.contextmanager
def _locked(path: Path, waits: Callable[[], None] | None) -> Iterator[None]:
    while True:
        file = path.open("a+b")
        try:
            if not _lock(file, wait=False):
                if waits is None:
                    raise BlockingIOError(f"{path} is locked")
                waits()
                _lock(file, wait=True)
            if _is_at(file, path):
                break
        except BaseException:
            file.close()
            raise
        # Its last owner removed it while this process waited, so it locks nothing any more.
        file.close()
        waits = waits and _nothing
    try:
        yield
    finally:
        # On Windows an open file cannot be removed.
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def _nothing() -> None:
    """Stands in for `waits` once that was called."""


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], wait: bool) -> bool:
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(POLL_SECONDS)
    else:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True
