"""Memory and time of a bundle's transformer graphs on the CPU: graphs per level against one for all levels, with and
without ONNX Runtime's packed copies of the weights.

    python scripts/bench/sessions.py BUNDLE... [--engine onnxruntime] [--engine openvino] [--rounds 3]

For every bundle and way: opens all of the transformer's graphs in a process of its own and runs each step's call for
one guided picture. A JSON line each: seconds to open them and run them first, seconds of the step's calls after that
(best round, summed over the steps), and resident memory, split into the process's own and the pages of mapped files.
Times of different processes hold only on an idle machine.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from far_runtime.bundle import Bundle, open_bundle
from far_runtime.engines import open_engine
from far_runtime.engines.base import EngineOptions
from far_runtime.sampling.base import Step
from far_runtime.sampling.settings import plan_of, resolve_settings

WAYS = {"onnxruntime": ("packed", "unpacked"), "openvino": ("",)}


def inputs_of(bundle: Bundle, step: Step) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of the transformer's call at a step, for one picture with guidance: zeros, since time does not depend on
    them and zero is a valid index."""
    call = next(call for call in step.calls if call.stage == "transformer")
    sizes = {"batch": 1, "rows": 2, **call.sizes}
    graph = bundle.manifest.graph("transformer", step.constants)
    return {
        spec.name: np.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape], spec.dtype)
        for spec in graph.inputs
        if spec.name not in step.constants
    }


def memory() -> dict[str, int]:
    """Resident megabytes of this process: `own` (anonymous), `files` (mapped files; pages that several mappings share
    count once, as the kernel's Pss does)."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines}
    return {
        "own_mb": round(kilobytes["Anonymous"] / 1000),
        "files_mb": round(kilobytes["Pss_File"] / 1000),
        "rss_mb": round(kilobytes["Rss"] / 1000),
    }


def measure(path: str, name: str, way: str, threads: int, rounds: int) -> dict[str, Any]:
    """Open all transformer graphs of a bundle and run every step."""
    bundle = open_bundle(path, check=False)
    engine: Any = open_engine(bundle, name, EngineOptions(threads=threads))
    if way:
        usual = engine._session_options

        def options_of(graph: Any) -> Any:
            options = usual(graph)
            options.add_session_config_entry("session.disable_prepacking", str(int(way == "unpacked")))
            return options

        engine._session_options = options_of
    steps = plan_of(bundle.manifest, resolve_settings(bundle.manifest))
    calls = [({n: engine.put(a) for n, a in inputs_of(bundle, step).items()}, step.constants) for step in steps]
    before = memory()
    started = time.perf_counter()
    for inputs, constants in calls:
        engine.run("transformer", inputs, constants)
    first = time.perf_counter() - started
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, (inputs, constants) in enumerate(calls):
            started = time.perf_counter()
            engine.run("transformer", inputs, constants)
            best[i] = min(best[i], time.perf_counter() - started)
    after = memory()
    graphs = sum(graph.stage == "transformer" for graph in bundle.manifest.graphs)
    grown = {key: after[key] - before[key] for key in after}
    return {
        "bundle": Path(path).name, "engine": f"{engine.name} {engine.version}", "weights": way, "graphs": graphs,
        "steps": len(calls), "first_s": round(first, 2), "steps_s": round(sum(best), 3), **grown,
    }  # fmt: skip


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--engine", "engines", multiple=True, type=click.Choice([*WAYS]), default=("onnxruntime",))
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(bundles: tuple[str, ...], engines: tuple[str, ...], threads: int, rounds: int) -> None:
    for bundle in bundles:
        for engine in engines:
            for way in WAYS[engine]:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    click.echo(json.dumps(pool.apply(measure, (bundle, engine, way, threads, rounds))))


if __name__ == "__main__":
    main()
