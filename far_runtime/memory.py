"""Memory of this machine and of this process, as the system tells it."""

from __future__ import annotations

import importlib
import os
import re
import sys
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
