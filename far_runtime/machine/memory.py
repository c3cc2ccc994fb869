"""Memory of this machine and of this process, as the system tells it."""

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
    """Largest resident memory of this process so far in bytes, files that it has mapped included; None where the system
    does not say.

    Not what getrusage says where there is better: on Linux that goes over to a child, whatever the child runs.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        status = ""
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    if found is not None:
        return int(found[1]) * 1024
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:  # Windows
        return None
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


EVERY = 0.05
"""Seconds between two looks at what has been read."""


@contextlib.contextmanager
def unmapping(path: Path) -> Iterator[None]:
    """Within the block, pages of a file that libraries have mapped and read do not stay in this process's memory.

    They remain in the system's cache, and are read from there should they be needed again. For files of which a library
    makes a copy. Nothing is done for mappings that can be written to, nor where the system is not Linux.
    """
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_DONTNEED"):
        yield
        return
    done, name = threading.Event(), str(path.resolve())

    def watch() -> None:
        while not done.wait(EVERY):
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
