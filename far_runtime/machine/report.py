"""What the machine is, and how much of its memory a process uses."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from far_runtime.machine.cpu import abilities, processor
from far_runtime.machine.memory import total_memory

LIBRARIES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "tensorrt", "tensorrt-rtx-cu12", "nncf")
FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16",
    "i8mm",
)  # fmt: skip
"""Instruction sets that decide how fast a processor multiplies."""


def machine_facts() -> dict[str, Any]:
    """Processor, cores, memory, system and the versions of installed libraries; None for what is not known."""
    return {
        "processor": processor().get("model name") or platform.processor() or platform.machine(),
        "abilities": [flag for flag in FLAGS if flag in abilities()],
        "processors": os.cpu_count(),
        "usable_processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": total_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: installed for name in LIBRARIES if (installed := _version(name)) is not None},
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
