"""The processor of this machine, by Linux's /proc/cpuinfo."""

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
    """Linux's names of the processor's instruction sets, such as "avx2"; empty where they are not known."""
    return processor().get("flags", processor().get("Features", "")).split()


def saturates(instruction_sets: Collection[str]) -> bool:
    """Whether sums of INT8 products may overflow on a processor with these instruction sets.

    x86-64 without VNNI adds the products in pairs of 16 bits, which may not hold the sum.
    """
    return "avx2" in instruction_sets and not {"avx512_vnni", "avx_vnni"} & set(instruction_sets)
