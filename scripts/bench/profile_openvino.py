"""Where OpenVINO spends a stage's time, by type and precision of its nodes.

    python scripts/bench/profile_openvino.py BUNDLE [--stage transformer] [--hint bf16] [--size rows=2 ...]

The call is that of one guided picture: 1 for the axis batch, 2 for rows, and for every other axis the largest size of
the manifest's profile, unless --size gives another. Fused nodes carry the name of the node that they were fused into;
attention that was fused as a whole shows as ScaledDotProductAttention.
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
"""Node types below this share of the time are not shown."""


def inputs_of(graph: Graph, sizes: dict[str, int]) -> dict[str, Any]:
    """Random inputs: floats N(0, 1), integers 0."""
    random = np.random.default_rng(0)
    inputs: dict[str, Any] = {}
    for spec in graph.inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        floating = np.issubdtype(np.dtype(spec.dtype), np.floating)
        inputs[spec.name] = random.standard_normal(shape, np.float32) if floating else np.zeros(shape, spec.dtype)
    return inputs


@click.command(help=__doc__)
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--stage", default="transformer", show_default=True, help="Stage to profile.")
@click.option(
    "--hint",
    type=click.Choice(["f32", "bf16"]),
    default="bf16",
    show_default=True,
    help="OpenVINO's inference precision hint.",
)
@click.option("--size", "given", multiple=True, metavar="AXIS=N", help="Size of an axis; may be repeated.")
def main(path: Path, stage: str, hint: str, given: tuple[str, ...]) -> None:
    import openvino as ov

    bundle = open_bundle(path, check=False)
    graph = next(graph for graph in bundle.manifest.graphs if graph.stage == stage)
    sizes = {axis: largest for axis, (_, _, largest) in graph.profile.items()} | {"batch": 1, "rows": 2}
    sizes |= {axis: int(size) for axis, _, size in (text.partition("=") for text in given)}
    engine: Any = OpenVinoEngine(bundle, "cpu", hint)
    settings = {**engine._settings, "PERF_COUNT": True}
    request = ov.Core().compile_model(str(bundle.path / graph.file), "CPU", settings).create_infer_request()
    inputs = inputs_of(graph, sizes)
    for name, array in inputs.items():
        request.set_tensor(name, ov.Tensor(array))
    seconds: dict[str, float] = {}
    for done in range(RUNS + 1):
        request.infer()
        for node in request.get_profiling_info() if done else ():
            node_type = f"{node.node_type} {node.exec_type.rpartition('_')[2]}"
            seconds[node_type] = seconds.get(node_type, 0.0) + node.real_time.total_seconds() / RUNS
    total = sum(seconds.values())
    shown = {name: sizes[name] for spec in graph.inputs for name in spec.shape if isinstance(name, str)}
    click.echo(
        f"{path} {stage}, {hint} hint, {shown}: {1000 * total:.1f} ms\n\n| nodes | ms | share |\n| --- | ---: | ---: |"
    )
    for node_type, time in sorted(seconds.items(), key=lambda item: -item[1]):
        if time >= LEAST * total:
            click.echo(f"| {node_type} | {1000 * time:.1f} | {100 * time / total:.1f} % |")


if __name__ == "__main__":
    main()
