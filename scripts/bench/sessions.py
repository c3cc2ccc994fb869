"""Memory and time of a bundle's transformer graphs on the CPU, with and without ONNX Runtime's prepacked weights.

    python scripts/bench/sessions.py BUNDLE... [--engine onnxruntime] [--engine openvino] [--rounds 3]

Compares bundles with a graph per level and bundles with one graph for all levels. For every bundle, engine and setting,
a process opens all transformer graphs and runs the call of each step for one guided picture. Prints a JSON line per
process: seconds to open the graphs and run them once (first_s), seconds of the calls after that (steps_s: best round,
summed over the steps), and resident memory, split into the process's own and the pages of mapped files. Times of
different processes can be compared on an idle machine only.
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
from far_runtime.sampling.settings import resolve_plan

PACKING = {"onnxruntime": ("packed", "unpacked"), "openvino": ("",)}


def inputs_of(bundle: Bundle, step: Step) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of the transformer's call at a step, for one picture with guidance.

    They are zeros: the time does not depend on them, and zero is a valid index.
    """
    call = next(call for call in step.calls if call.stage == "transformer")
    sizes = {"batch": 1, "rows": 2, **call.sizes}
    graph = bundle.manifest.graph("transformer", step.constants)
    return {
        spec.name: np.zeros([sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape], spec.dtype)
        for spec in graph.inputs
        if spec.name not in step.constants
    }


def memory() -> dict[str, int]:
    """Resident memory of this process in MB: in all, its own (anonymous), and of mapped files (Pss)."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines}
    return {
        "own_mb": round(kilobytes["Anonymous"] / 1000),
        "files_mb": round(kilobytes["Pss_File"] / 1000),
        "rss_mb": round(kilobytes["Rss"] / 1000),
    }


def measure(path: str, name: str, packing: str, threads: int, rounds: int) -> dict[str, Any]:
    """Open all transformer graphs of a bundle and run every step."""
    bundle = open_bundle(path, check=False)
    engine: Any = open_engine(bundle, name, EngineOptions(threads=threads))
    if packing:
        session_options = engine._session_options

        def options_of(graph: Any) -> Any:
            options = session_options(graph)
            options.add_session_config_entry("session.disable_prepacking", str(int(packing == "unpacked")))
            return options

        engine._session_options = options_of
    steps = resolve_plan(bundle.manifest)[1]
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
        "bundle": Path(path).name, "engine": f"{engine.name} {engine.version}", "weights": packing, "graphs": graphs,
        "steps": len(calls), "first_s": round(first, 2), "steps_s": round(sum(best), 3), **grown,
    }  # fmt: skip


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True))
@click.option(
    "--engine", "engines", multiple=True, type=click.Choice([*PACKING]), default=("onnxruntime",), show_default=True
)
@click.option("--threads", default=2, show_default=True, help="Threads of the engine.")
@click.option("--rounds", default=3, show_default=True, help="Rounds over all steps.")
def main(bundles: tuple[str, ...], engines: tuple[str, ...], threads: int, rounds: int) -> None:
    for bundle in bundles:
        for engine in engines:
            for packing in PACKING[engine]:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    click.echo(json.dumps(pool.apply(measure, (bundle, engine, packing, threads, rounds))))


if __name__ == "__main__":
    main()
