"""Memory of this machine and of this process."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def total_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_memory() -> int | None:
    """Largest resident memory of this process so far in bytes, with files that it has mapped; None where the system
    does not tell it.

    On Linux it comes from /proc: the figure of getrusage is inherited by child processes.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        status = ""
    match = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    if match is not None:
        return int(match[1]) * 1024
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:  # Windows
        return None
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


UNMAP_SECONDS = 0.05
"""How often `unmapping` releases the pages that have been read."""


@contextlib.contextmanager
def unmapping(path: Path) -> Iterator[None]:
    """Within the block, release pages of a file from this process's memory soon after a library has read them.

    It is for files that a library maps and copies. The pages stay in the system's page cache. Mappings that can be
    written to are left alone; on systems other than Linux nothing is done.
    """
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_DONTNEED"):
        yield
        return
    done, name = threading.Event(), str(path.resolve())

    def watch() -> None:
        while not done.wait(UNMAP_SECONDS):
            _unmap(name)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        _unmap(name)


def _unmap(name: str) -> None:
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5] == name and fields[1].startswith("r-"):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
