"""The facts about a bundle that `far inspect` shows: contents, cost of a picture, presets and compiled engines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from far_runtime.bundle import Bundle, Manifest
from far_runtime.engines.cache.compatibility import device_of, incompatibility
from far_runtime.engines.cache.store import EngineCache
from far_runtime.errors import FarError
from far_runtime.machine.gpu import find_gpu
from far_runtime.sampling.flops import picture_cost, step_flops
from far_runtime.sampling.presets import preset_names, preset_of
from far_runtime.sampling.settings import check_system, resolve_plan


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Everything that `far inspect` shows, as JSON values; "gflop" is 10^9 operations, of one picture."""
    check_system(bundle)
    manifest = bundle.manifest
    settings, plan = resolve_plan(manifest)
    gflop = {stage: flops / 1e9 for stage, flops in picture_cost(manifest, plan).items()}
    rows = [
        {
            "kind": step.kind,
            "number": step.number,
            "inner": step.substeps,
            "guidance": step.guidance,
            **step.details,
            "constants": dict(step.constants),
            "graph": manifest.graph(step.calls[0].stage, step.calls[0].constants).name,
            "gflop": step_flops(manifest, step) / 1e9,
        }
        for step in plan
    ]
    return {
        "path": str(bundle.path),
        "id": manifest.id,
        "system": manifest.system,
        "precision": manifest.precision,
        "created_by": manifest.created_by,
        "source": manifest.source,
        "model": manifest.model.to_json(),
        "defaults": settings,
        "schedule": rows,
        "presets": preset_facts(manifest),
        "gflop": gflop,
        "gflop_total": sum(gflop.values()),
        "graphs": [asdict(graph) for graph in manifest.graphs],
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "classes": list(manifest.classes),
        "engines": engine_facts(bundle),
    }


def preset_facts(manifest: Manifest) -> list[dict[str, Any]]:
    """The presets of a bundle, the cost of a picture with each, and what `far tune` has measured ({}: not tuned).

    Presets that the bundle's graphs cannot compute are left out: its graphs may be of some levels only.
    """
    rows = []
    for name in preset_names(manifest):
        try:
            settings, plan = resolve_plan(manifest, {"preset": name})
        except FarError:
            continue
        gflop = sum(picture_cost(manifest, plan).values()) / 1e9
        measured = dict(preset_of(manifest, name).measured)
        rows.append({"name": name, "settings": settings, "measured": measured, "gflop": gflop})
    return rows


def engine_facts(bundle: Bundle) -> list[dict[str, Any]]:
    """The compiled engines of a bundle, newest first; "misfit" tells why one cannot be used here, or is ""."""
    cached = EngineCache(bundle).entries()
    gpu = find_gpu() if cached else None
    return [
        {
            "name": engine.name,
            "path": str(engine.path),
            "library": engine.library,
            "version": engine.facts.get("version", ""),
            "precision": engine.facts.get("precision", ""),
            "device": device_of(engine),
            "flags": engine.facts.get("flags", {}),
            "bytes": engine.size,
            "created": engine.created,
            "seconds": engine.seconds,
            "notes": dict(engine.notes),
            "misfit": incompatibility(engine, bundle, gpu),
        }
        for engine in cached
    ]
