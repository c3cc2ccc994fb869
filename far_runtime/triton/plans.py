"""TensorRT plans of a bundle, as the tensorrt backend of a Triton server takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from far_runtime.bundle import Bundle
from far_runtime.engines.cache.compatibility import device_of, stale_reason
from far_runtime.engines.cache.entry import CachedEngine
from far_runtime.engines.cache.store import EngineCache
from far_runtime.errors import FarError

LIBRARY = "tensorrt"


@dataclass(frozen=True)
class Plans:
    """What `far build` made of a bundle. largest: pictures of a batch that all of its plans take."""

    engine: CachedEngine
    largest: int

    def profiles(self, graph: str) -> int:
        """How many optimisation profiles a graph's plan has; Triton uses the first alone unless all are named."""
        return max(len(self.engine.facts["shapes"][graph]), 1)

    @property
    def line(self) -> str:
        """What the server that runs them has to have."""
        flags = self.engine.facts["flags"]
        version = f"TensorRT {self.engine.facts['version']}"
        more = " or later, with --backend-config=tensorrt,version-compatible=true"
        return f"plans of {self.engine.name}: for {device_of(self.engine)}, {version}" + (
            more if flags.get("version_compatible") else " and no other"
        )


def plans_of(bundle: Bundle, named: str | None = None) -> Plans:
    """The newest engine that `far build --engine tensorrt` made of a bundle, for whichever GPU; named: the one of this
    name. FarError where there is none, or the server could not load it."""
    reasons = []
    for engine in EngineCache(bundle).entries():
        if named is not None and engine.name != named:
            continue
        if engine.library == LIBRARY or engine.problem:
            reason = stale_reason(engine, bundle) or _unfit(bundle, engine)
            if not reason:
                return Plans(engine, _batch(bundle, engine)[1])
            reasons.append(f"{engine.name}: {reason}")
    what = "no tensorrt engine" if named is None else f"no tensorrt engine {named}"
    raise FarError(
        f"{bundle.path}: {what} to serve ({'; '.join(reasons) or 'none was built'}); build one on the GPU that will "
        f"serve with: far build {bundle.path} --engine tensorrt"
    )


def _unfit(bundle: Bundle, engine: CachedEngine) -> str:
    """Why Triton cannot run an engine that our own loader runs; "" if it can."""
    flags = engine.facts.get("flags", {})
    if flags.get("stripped"):
        return "its plans are without weights (--weight-stripped), which Triton does not put in"
    low, high = _batch(bundle, engine)
    return f"built for {low} to {high} pictures, and a request may come alone (--batch 1:4:8)" if low > 1 else ""


def _batch(bundle: Bundle, engine: CachedEngine) -> tuple[int, int]:
    """Fewest and most pictures that all plans take, from the profiles as the sidecar shows them: "1x8:4x8:64x8"."""
    low, high = 1, 1 << 20
    for graph in bundle.manifest.graphs:
        names = [spec.name for spec in graph.inputs if spec.shape[0] == "batch"]
        shown: Sequence[str] = [
            profile[name] for profile in engine.facts["shapes"][graph.name] for name in names if name in profile
        ]
        if shown:
            sizes = [[int(shape.partition("x")[0]) for shape in one.split(":")] for one in shown]
            low, high = max(low, min(size[0] for size in sizes)), min(high, max(size[-1] for size in sizes))
    return low, high
