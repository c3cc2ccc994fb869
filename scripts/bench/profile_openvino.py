"""Where OpenVINO spends a stage's time, by type and precision of its nodes.

    python scripts/bench/profile_openvino.py BUNDLE [--stage transformer] [--hint bf16] [--size rows=2 ...]

One picture guided: rows 2, batch 1, every other axis at its largest of the manifest's profile unless --size says
another. What the engine fused carries the name of what it fused into; attention that it keeps in one piece would be a
ScaledDotProductAttention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from far_runtime.bundle import Graph, open_bundle
from far_runtime.engines.openvino import OpenVinoEngine

RUNS = 3
LEAST = 0.005


def inputs_of(graph: Graph, sizes: dict[str, int]) -> dict[str, Any]:
    """Random inputs: floats N(0, 1), integers 0."""
    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for spec in graph.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        floating = np.issubdtype(np.dtype(spec.dtype), np.floating)
        found[spec.name] = random.standard_normal(shape, np.float32) if floating else np.zeros(shape, spec.dtype)
    return found


@click.command(help=__doc__)
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--stage", default="transformer", show_default=True)
@click.option("--hint", type=click.Choice(["f32", "bf16"]), default="bf16", show_default=True)
@click.option("--size", "given", multiple=True, metavar="AXIS=N")
def main(path: Path, stage: str, hint: str, given: tuple[str, ...]) -> None:
    import openvino as ov

    bundle = open_bundle(path, check=False)
    graph = next(one for one in bundle.manifest.graphs if one.stage == stage)
    sizes = {axis: largest for axis, (_, _, largest) in graph.profile.items()} | {"batch": 1, "rows": 2}
    sizes |= {axis: int(size) for axis, _, size in (one.partition("=") for one in given)}
    engine: Any = OpenVinoEngine(bundle, "cpu", hint)
    settings = {**engine._settings, "PERF_COUNT": True}
    request = ov.Core().compile_model(str(bundle.path / graph.file), "CPU", settings).create_infer_request()
    inputs = inputs_of(graph, sizes)
    for name, array in inputs.items():
        request.set_tensor(name, ov.Tensor(array))
    found: dict[str, float] = {}
    for turn in range(RUNS + 1):
        request.infer()
        for node in request.get_profiling_info() if turn else ():
            kind = f"{node.node_type} {node.exec_type.rpartition('_')[2]}"
            found[kind] = found.get(kind, 0.0) + node.real_time.total_seconds() / RUNS
    total = sum(found.values())
    shown = {name: sizes[name] for spec in graph.inputs for name in spec.shape if isinstance(name, str)}
    click.echo(
        f"{path} {stage}, {hint} hint, {shown}: {1000 * total:.1f} ms\n\n| nodes | ms | share |\n| --- | ---: | ---: |"
    )
    for kind, seconds in sorted(found.items(), key=lambda item: -item[1]):
        if seconds >= LEAST * total:
            click.echo(f"| {kind} | {1000 * seconds:.1f} | {100 * seconds / total:.1f} % |")


if __name__ == "__main__":
    main()
