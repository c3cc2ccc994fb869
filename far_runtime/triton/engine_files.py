"""TensorRT engine files that `far build` made, for Triton's tensorrt backend."""

from __future__ import annotations

from dataclasses import dataclass

from far_runtime.bundle import Bundle
from far_runtime.engines.cache.compatibility import device_of, stale_reason
from far_runtime.engines.cache.entry import CachedEngine
from far_runtime.engines.cache.store import EngineCache
from far_runtime.errors import FarError

LIBRARY = "tensorrt"


@dataclass(frozen=True)
class EngineFiles:
    """The engine files of a bundle, one for each graph."""

    engine: CachedEngine
    """The entry of the engine cache that they belong to."""

    max_batch: int
    """Pictures of the largest batch that all of them take."""

    def profiles(self, graph: str) -> int:
        """How many optimization profiles a graph's engine has; Triton uses only the first unless all are listed."""
        return max(len(self.engine.facts["shapes"][graph]), 1)

    @property
    def requirements(self) -> str:
        """What the server that runs them needs, as a line for the user."""
        flags = self.engine.facts["flags"]
        version = f"TensorRT {self.engine.facts['version']}"
        if flags.get("version_compatible"):
            version += " or later, with --backend-config=tensorrt,version-compatible=true"
        else:
            version += " and no other version"
        return f"plans of {self.engine.name}: for {device_of(self.engine)}, {version}"


def find_engine_files(bundle: Bundle, name: str | None = None) -> EngineFiles:
    """The engine files of a bundle, for whichever GPU: those of the engine of that name, or of the newest engine.

    Raises FarError if there are none that Triton can load.
    """
    reasons = []
    for engine in EngineCache(bundle).entries():
        if name is not None and engine.name != name:
            continue
        if engine.library == LIBRARY or engine.problem:
            reason = stale_reason(engine, bundle) or _incompatibility(bundle, engine)
            if not reason:
                return EngineFiles(engine, _batch_range(bundle, engine)[1])
            reasons.append(f"{engine.name}: {reason}")
    what = "no tensorrt engine" if name is None else f"no tensorrt engine {name}"
    raise FarError(
        f"{bundle.path}: {what} to serve ({'; '.join(reasons) or 'none was built'}); build one on the GPU that will "
        f"serve with: far build {bundle.path} --engine tensorrt"
    )


def _incompatibility(bundle: Bundle, engine: CachedEngine) -> str:
    """Why Triton cannot run an engine that the engine `tensorrt` runs; "" if it can."""
    flags = engine.facts.get("flags", {})
    if flags.get("stripped"):
        return "its engine files are without weights (--weight-stripped), which Triton does not add"
    low, high = _batch_range(bundle, engine)
    return f"built for {low} to {high} pictures, and a request may come alone (--batch 1:4:8)" if low > 1 else ""


def _batch_range(bundle: Bundle, engine: CachedEngine) -> tuple[int, int]:
    """The smallest and the largest batch that all engine files take, from their profiles, such as "1x8:4x8:64x8"."""
    low, high = 1, 1 << 20
    for graph in bundle.manifest.graphs:
        names = [spec.name for spec in graph.inputs if spec.shape[0] == "batch"]
        ranges: list[str] = [
            profile[name] for profile in engine.facts["shapes"][graph.name] for name in names if name in profile
        ]
        if ranges:
            sizes = [[int(shape.partition("x")[0]) for shape in shapes.split(":")] for shapes in ranges]
            low, high = max(low, min(size[0] for size in sizes)), min(high, max(size[-1] for size in sizes))
    return low, high
