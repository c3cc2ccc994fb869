"""Compiled graphs for an engine that runs them: from the newest folder of the cache that fits this machine."""

from __future__ import annotations

from collections.abc import Callable

from far_runtime.bundle import Bundle
from far_runtime.engines.cache.compatibility import misfit
from far_runtime.engines.cache.entry import CachedEngine
from far_runtime.engines.cache.store import EngineCache
from far_runtime.errors import FarError
from far_runtime.machine.gpu import find_gpu


def cached_plans(bundle: Bundle, library: str) -> Callable[[str], bytes]:
    """Reads the plan of a graph, its SHA-256 checked; looks for the engine at the first call.

    Raises FarError where no engine was built, or none fits here, with the reasons and the command that builds one.
    """
    chosen: list[CachedEngine] = []

    def read(graph: str) -> bytes:
        if not chosen:
            chosen.append(fitting(bundle, library))
        return chosen[0].read(graph)

    return read


def fitting(bundle: Bundle, library: str) -> CachedEngine:
    """The newest engine of a library that fits this bundle and this machine; FarError if there is none."""
    gpu, reasons = find_gpu(), []
    for engine in EngineCache(bundle).entries(check=False):
        if engine.library == library or not engine.library:
            reason = misfit(engine, bundle, gpu)
            if not reason:
                return engine
            reasons.append(f"{engine.name}: {reason}")
    raise FarError(
        f"{bundle.path}: no {library} engine fits here ({'; '.join(reasons) or 'none was built'}); build one with: "
        f"far build {bundle.path} --engine {library}"
    )
