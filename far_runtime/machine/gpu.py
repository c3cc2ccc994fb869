"""The NVIDIA GPU of this machine, as cuda-python names it. Not run on a GPU by us."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """Its name, and its compute capability as "8.9"."""

    name: str
    compute_capability: str

    @property
    def target(self) -> str:
        """ "8.9" -> "sm89"."""
        return "sm" + self.compute_capability.replace(".", "")


def find_gpu() -> Gpu | None:
    """The current CUDA device, or None where there is no cuda-python, no driver or no GPU."""
    api = cuda_runtime()
    if api is None:
        return None
    try:
        error, count = api.cudaGetDeviceCount()
        if int(error) or not count:
            return None
        error, device = api.cudaGetDevice()
        error, properties = api.cudaGetDeviceProperties(device) if not int(error) else (error, None)
    except RuntimeError:  # no driver at all, as cuda-python says it
        return None
    if int(error) or properties is None:
        return None
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(name.strip("\0 "), f"{properties.major}.{properties.minor}")


def gpu_memory() -> dict[str, Any] | None:
    """The current GPU's name, its memory, and how much of it all processes use, in bytes; None where there is no
    GPU."""
    gpu, api = find_gpu(), cuda_runtime()
    if gpu is None or api is None:
        return None
    error, free, total = api.cudaMemGetInfo()
    return None if int(error) else {"name": gpu.name, "memory_bytes": int(total), "used_bytes": int(total) - int(free)}


def cuda_runtime() -> Any:
    """The module of cuda-python that has the CUDA runtime's calls; None where it is not installed."""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # the second is its name before 12.6
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):
            continue
    return None
