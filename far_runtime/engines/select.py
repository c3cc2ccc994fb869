"""The choice of an engine where the user names none: the fastest that is installed and can run the bundle."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from far_runtime.bundle import Bundle
from far_runtime.engines.cache.compatibility import MODULES
from far_runtime.errors import FarError
from far_runtime.machine.memory import total_memory

if TYPE_CHECKING:
    from far_runtime.engines.cache.entry import CachedEngine

X86 = ("x86_64", "amd64")
DRIVERS = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/dxg")
"""Device files of NVIDIA GPUs: on Linux, on a Jetson, in WSL."""

CUDA_LIBRARIES = ("libonnxruntime_providers_cuda.so", "onnxruntime_providers_cuda.dll")


@dataclass(frozen=True)
class Choice:
    """An engine and why it was chosen."""

    name: str
    """As `open_engine` takes it, such as "openvino:cpu"."""
    reason: str = ""
    """Why it is the best one here; empty where the user named it."""
    cached: CachedEngine | None = None
    """The compiled engine that was found in the bundle's cache; None where nobody looked."""


def choose(bundle: Bundle) -> Choice:
    """The engine for a bundle on this machine. No library is imported to find out, but where there is a GPU.

    First a GPU's: what was built for it (far build), then ONNX Runtime with CUDA. Then OpenVINO on x86-64 processors,
    where it takes about 0.6 of ONNX Runtime's time (docs/engines.md), then ONNX Runtime. Raises FarError where nothing
    that can compute the bundle is installed.
    """
    for choice in candidates(bundle):
        return choice
    if bundle.manifest.precision == "bf16" and folder_of("onnxruntime") is not None:
        raise FarError(
            f"{bundle.path}: a bundle of BF16 graphs, which onnxruntime cannot compute on the CPU; install an engine "
            "that can with: pip install 'far-deploy[openvino]'"
        )
    raise FarError(
        "no engine is installed; install one with: pip install 'far-deploy[openvino]' (the fastest on x86-64 "
        "processors), 'far-deploy[cpu]' (onnxruntime) or 'far-deploy[gpu]' (onnxruntime for CUDA)"
    )


def candidates(bundle: Bundle) -> Iterator[Choice]:
    """The engines that could run a bundle here, best first."""
    precision = bundle.manifest.precision
    runtime = folder_of("onnxruntime")
    if has_gpu():
        for library, module in MODULES.items():
            if folder_of(module) is not None and (cached := built_engine(bundle, library)):
                yield Choice(library, "built for this GPU", cached)
    if runtime is not None and has_gpu() and any((runtime / "capi" / name).is_file() for name in CUDA_LIBRARIES):
        yield Choice("onnxruntime:cuda", "there is an NVIDIA GPU, and this onnxruntime has CUDA")
    openvino = folder_of("openvino") is not None
    x86 = platform.machine().lower() in X86
    # OpenVINO holds a copy of the weights for every graph.
    copies = 4 * sum(graph.parameters for graph in bundle.manifest.graphs)
    crowded = runtime is not None and precision != "bf16" and copies > (total_memory() or math.inf) / 2
    if openvino and x86 and not crowded:
        yield Choice("openvino:cpu", "installed, and the fastest on x86-64 processors")
    if runtime is not None and precision != "bf16":
        missing = "" if openvino or not x86 else " (openvino, which is faster, is not)"
        large = f"openvino would hold {copies / 1e9:.1f} GB of weights, a copy a graph"
        yield Choice("onnxruntime:cpu", large if openvino and crowded else f"installed{missing}")
    if openvino and not x86:
        yield Choice("openvino:cpu", "installed" if runtime is None else "it computes BF16, onnxruntime does not")


def built_engine(bundle: Bundle, library: str) -> CachedEngine | None:
    """The engine in the cache that fits this bundle and this machine; None where there is none."""
    from far_runtime.engines.cache.compatibility import find_compatible

    try:
        return find_compatible(bundle, library)
    except FarError:
        return None


def folder_of(module: str) -> Path | None:
    """Where a package is, without importing it; None where it is not, or is a folder of type stubs only."""
    # None is how Python marks a module that must not be imported.
    if sys.modules.get(module, module) is None:
        return None
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def has_gpu() -> bool:
    """Whether the system shows an NVIDIA GPU."""
    return any(Path(path).exists() for path in DRIVERS)


def best_unless(name: str | None, bundle: Bundle) -> Choice:
    """The engine of that name, without a reason; without a name, the best one here (`choose`), with its reason."""
    return choose(bundle) if name is None else Choice(name)
