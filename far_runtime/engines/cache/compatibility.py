"""Why a cached engine does not fit this bundle on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from far_runtime.bundle import Bundle
from far_runtime.engines.cache.entry import CachedEngine, bundle_facts
from far_runtime.engines.cache.store import EngineCache
from far_runtime.errors import FarError
from far_runtime.machine.gpu import Gpu, find_gpu

DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
    "tensorrt-rtx": ("tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "tensorrt-rtx"),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}
RECIPE = 2
"""Number of the way in which `far build` uses TensorRT; engines that were built in another way are not used."""

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python modules of the libraries that `far build` builds engines with."""

EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
"""The extras of far-deploy that install these libraries."""


def library_version(library: str) -> str:
    """Version of an engine library as it is installed here; "" where it is not.

    On a Jetson the system brings the module without a package: then it is the module's version.
    """
    for name in DISTRIBUTIONS.get(library, (library,)):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    if library in MODULES:
        import importlib

        try:
            return str(importlib.import_module(MODULES[library]).__version__)
        except (ImportError, AttributeError, OSError):
            return ""
    return ""


def stale_reason(engine: CachedEngine, bundle: Bundle) -> str:
    """Why an engine can be removed: damaged, of another export, or of another version of its library; "" if none."""
    if engine.problem:
        return engine.problem
    for name, value in bundle_facts(bundle).items():
        if engine.facts.get(name) != value:
            return "of another export of this bundle"
    if engine.library in MODULES and engine.facts.get("recipe") != RECIPE:
        return "built by another far-deploy"
    here = library_version(engine.library)
    if here and not _version_fits(engine.facts, here):
        return f"built by {engine.library} {engine.facts.get('version')}, here is {here}"
    return ""


def incompatibility(engine: CachedEngine, bundle: Bundle, gpu: Gpu | None) -> str:
    """Why an engine cannot be used here; "" if it can. gpu: the GPU of this machine, None where there is none."""
    reason = stale_reason(engine, bundle)
    if reason:
        return reason
    if not library_version(engine.library):
        return f"{engine.library} is not installed here"
    return _device_mismatch(engine, gpu)


def _version_fits(facts: Mapping[str, Any], here: str) -> bool:
    built = str(facts.get("version", ""))
    if built == here:
        return True
    compatible = bool(facts.get("flags", {}).get("version_compatible"))
    return compatible and _numbers(built)[:1] == _numbers(here)[:1] and _numbers(built) <= _numbers(here)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".") if part.isdigit()]


def _device_mismatch(engine: CachedEngine, gpu: Gpu | None) -> str:
    facts = engine.facts
    if engine.library not in MODULES:
        return ""
    if gpu is None:
        return f"for {device_of(engine)}; no NVIDIA GPU here"
    here = gpu.compute_capability
    if "targets" in facts:
        return "" if gpu.target in facts["targets"] else f"for {device_of(engine)}, here is {gpu.target}"
    portable = facts.get("flags", {}).get("hardware_compatible")
    if portable == "ampere+":
        fits = _numbers(here) >= [8, 0]
    elif portable == "same-cc":
        fits = here == facts.get("compute_capability")
    else:
        fits = (here, gpu.name) == (facts.get("compute_capability"), facts.get("device"))
    return "" if fits else f"for {device_of(engine)}, here is {gpu.name} ({here})"


def device_of(engine: CachedEngine) -> str:
    """What an engine was built for, in words."""
    facts = engine.facts
    if "targets" in facts:
        return ", ".join(facts["targets"])
    capability = f" ({facts['compute_capability']})" if facts.get("compute_capability") else ""
    return f"{facts.get('device', '')}{capability}"


def engine_file_reader(bundle: Bundle, library: str, engine: CachedEngine | None = None) -> Callable[[str], bytes]:
    """A function that reads the engine file of a graph and checks its SHA-256.

    engine: from the cache; None: the newest one that fits here, which is looked for at the first call.
    Raises FarError where no engine was built, or none fits here, with the reasons and the command that builds one.
    """

    def read(graph: str) -> bytes:
        nonlocal engine
        engine = engine or find_compatible(bundle, library)
        return engine.read(graph)

    return read


def find_compatible(bundle: Bundle, library: str) -> CachedEngine:
    """The newest engine of a library that fits this bundle and this machine; FarError if there is none."""
    gpu, reasons = find_gpu(), []
    for engine in EngineCache(bundle).entries(check=False):
        if engine.library == library or not engine.library:
            reason = incompatibility(engine, bundle, gpu)
            if not reason:
                return engine
            reasons.append(f"{engine.name}: {reason}")
    raise FarError(
        f"{bundle.path}: no {library} engine fits here ({'; '.join(reasons) or 'none was built'}); build one with: "
        f"far build {bundle.path} --engine {library}"
    )
