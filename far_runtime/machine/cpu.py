"""What the processor can do, as far as Linux tells."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@cache
def processor() -> dict[str, str]:
    """The entries of /proc/cpuinfo for the first processor; empty where there is no such file."""
    try:
        first = CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    return entries(first)


def entries(text: str) -> dict[str, str]:
    """Names and values of lines "name : value"."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def abilities() -> Collection[str]:
    """The names of its instruction sets, as Linux calls them."""
    return processor().get("flags", processor().get("Features", "")).split()


def saturates(can: Collection[str]) -> bool:
    """Whether a processor of these abilities adds the products of INT8 in pairs of 16 bits, which may not hold them:
    x86-64 without VNNI."""
    return "avx2" in can and not {"avx512_vnni", "avx_vnni"} & set(can)
