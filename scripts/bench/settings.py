"""Engine options and precisions compared in interleaved rounds of one process; and the time to load a graph.

    python scripts/bench/settings.py BUNDLE [BUNDLE ...] [--pictures 8] [--rounds 7]

Part "pictures" draws whole pictures: every bundle on ONNX Runtime, on OpenVINO and on OpenVINO with the bf16 hint, and
the first bundle with OpenVINO's throughput mode, without bound threads, and with fused attention. Part "loading" loads
every graph of the first bundle: compiled or imported (OpenVINO), as it is or optimised before (ONNX Runtime), beside
the time of its checksum. Part "head" runs the head with dynamic and with fixed shapes. All times are medians; ratios
are to the first row.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from far_runtime.bundle import Bundle, Graph, open_bundle
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.openvino import OpenVinoEngine
from far_runtime.pipeline import Pipeline
from timing import median_seconds, print_ratios

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "SNIPPETS_MODE": "DISABLE"}


def pictures(bundles: list[Bundle], count: int, rounds: int) -> None:
    """Time whole pictures by engine, precision and engine option."""
    first = bundles[0]
    fused = OpenVinoEngine(first)
    del fused._settings["SNIPPETS_MODE"]
    opened = {}
    for bundle in bundles:
        precision = bundle.manifest.precision
        opened[f"{precision}, openvino"] = Pipeline.over(bundle, "openvino")
        opened[f"{precision}, openvino:cpu:bf16"] = Pipeline.over(bundle, "openvino:cpu:bf16")
        if precision != "bf16":
            opened[f"{precision}, onnxruntime"] = Pipeline.over(bundle, "onnxruntime")
    precision = first.manifest.precision
    for name, options in {
        "throughput": EngineOptions(mode="throughput"), "no pinning": EngineOptions(pinning=False)
    }.items():  # fmt: skip
        opened[f"{precision}, openvino, {name}"] = Pipeline.over(first, "openvino", options)
    opened[f"{precision}, openvino, with fused attention"] = Pipeline(first, fused)
    draws = {
        name: lambda pipeline=pipeline: pipeline.generate([0] * count, range(count))  # type: ignore[misc]
        for name, pipeline in opened.items()
    }
    print_ratios(f"{count} pictures at once", median_seconds(draws, rounds))


def loading(bundle: Bundle, rounds: int) -> None:
    """Time the loading of every graph."""
    import onnxruntime
    import openvino

    core = openvino.Core()
    click.echo(
        "\nSeconds to load a graph\n\n| graph | engine | as it is | kept | SHA-256 | MB |\n" + "| --- " * 6 + "|"
    )
    with tempfile.TemporaryDirectory() as aside:
        for graph in bundle.manifest.graphs:
            path = str(bundle.path / graph.file)
            for hint in ("f32", "bf16"):
                settings = {**SETTINGS, "INFERENCE_PRECISION_HINT": hint}
                blob = core.compile_model(path, "CPU", settings).export_model().getvalue()
                functions = {
                    "plain": lambda p=path, s=settings: core.compile_model(p, "CPU", s).create_infer_request(),
                    "kept": lambda b=blob, s=settings: core.import_model(b, "CPU", s).create_infer_request(),
                    "sum": lambda b=blob: hashlib.sha256(b).hexdigest(),
                }
                line(graph, f"openvino {hint}", median_seconds(functions, rounds), len(blob))
            optimised = Path(aside) / graph.file
            options = onnxruntime.SessionOptions()
            options.optimized_model_filepath = str(optimised)
            for key, value in (("file_name", f"{graph.name}.bin"), ("min_size_in_bytes", "1024")):
                options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
            session(onnxruntime, path, options)
            plain = onnxruntime.SessionOptions()
            plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            files = [optimised, optimised.with_name(f"{graph.name}.bin")]
            data = b"".join(file.read_bytes() for file in files if file.exists())
            functions = {
                "plain": lambda p=path: session(onnxruntime, p, onnxruntime.SessionOptions()),
                "kept": lambda p=str(optimised), o=plain: session(onnxruntime, p, o),
                "sum": lambda d=data: hashlib.sha256(d).hexdigest(),
            }
            line(graph, "onnxruntime", median_seconds(functions, rounds), len(data))


def session(onnxruntime: Any, path: str, options: Any) -> Any:
    """An ONNX Runtime session that logs nothing."""
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def line(graph: Graph, engine: str, seconds: Mapping[str, float], size: int) -> None:
    """Print a row on one graph; size: bytes of the compiled or optimised form."""
    cells = " | ".join(f"{seconds[name]:.3f}" for name in ("plain", "kept", "sum"))
    click.echo(f"| {graph.name} | {engine} | {cells} | {size / 1e6:.1f} |")


def head_sizes(bundle: Bundle, count: int, rounds: int) -> None:
    """Time one call of the head, for `count` pictures with guidance."""
    import openvino

    core, graph = openvino.Core(), bundle.manifest.graph("denoise", {})
    sizes = {"batch": count, "rows": 2 * count}
    shapes = {spec.name: [sizes.get(str(axis), axis) for axis in spec.shape] for spec in graph.inputs}
    inputs = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    functions = {}
    for hint in ("f32", "bf16"):
        for kind in ("dynamic", "fixed"):
            model = core.read_model(bundle.path / graph.file)
            if kind == "fixed":
                model.reshape(shapes)
            compiled = core.compile_model(model, "CPU", {**SETTINGS, "INFERENCE_PRECISION_HINT": hint})
            request = compiled.create_infer_request()
            functions[f"{hint}, {kind}"] = lambda request=request: request.infer(inputs)
    print_ratios(f"the head, {count} pictures guided", median_seconds(functions, rounds))


@click.command(help=__doc__)
@click.argument("paths", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--pictures", "count", type=int, default=8, show_default=True, help="Pictures of a batch.")
@click.option("--rounds", type=int, default=7, show_default=True, help="Rounds; the times are medians over them.")
@click.option(
    "--part",
    type=click.Choice(["pictures", "loading", "head"]),
    multiple=True,
    help="What to time; may be repeated. Default: all.",
)
def main(paths: tuple[Path, ...], count: int, rounds: int, part: tuple[str, ...]) -> None:
    bundles = [open_bundle(path) for path in paths]
    if not part or "pictures" in part:
        pictures(bundles, count, rounds)
    if not part or "loading" in part:
        loading(bundles[0], rounds)
    if not part or "head" in part:
        head_sizes(bundles[0], count, rounds)


if __name__ == "__main__":
    main()
