"""The NVIDIA GPU of this machine, by cuda-python. Not run on a GPU by us."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    """CUDA's name of the device, such as "NVIDIA L4"."""
    compute_capability: str
    """Its compute capability, such as "8.9"."""

    @property
    def target(self) -> str:
        """Its compute capability as `far build --target` takes it: "sm89"."""
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
    # cuda-python raises it where there is no driver.
    except RuntimeError:
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
