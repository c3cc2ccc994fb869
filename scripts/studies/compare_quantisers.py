"""Quantisers, and what they leave in FP32, compared by their relative errors on the calls of a bundle.

    python scripts/studies/compare_quantisers.py FP32_BUNDLE [--calibrate 16] [--pictures 8] [--nncf]

Calls of the transformer and the head are recorded while the ordinary pipeline draws: of some pictures for calibration,
of others for the errors. Every quantiser writes int8 products in QDQ form, with weights per channel and biases in FP32,
and ONNX Runtime runs the result. --nncf needs NNCF (pip install nncf), which far-deploy does not depend on.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray

from far_export.onnx.calibration import calibrate
from far_export.onnx.quantize import MATRICES, MatMul, matmuls_of, quantize_graph
from far_runtime.bundle import Bundle, Graph, open_bundle
from far_runtime.conditioning.subjects import spread_subjects
from far_runtime.engines import open_engine
from far_runtime.engines.base import Array
from far_runtime.pipeline import Pipeline

STAGES = ("transformer", "denoise")
Call = tuple[dict[str, NDArray[Any]], NDArray[Any]]
"""A stage's inputs by name, and its one output."""


class Recorder:
    """An engine that keeps the inputs and outputs of the quantised stages' calls."""

    def __init__(self, bundle: Bundle) -> None:
        self._inner, self._manifest = open_engine(bundle, "onnxruntime"), bundle.manifest
        self.name, self.put, self.get, self.close = "recorder", self._inner.put, self._inner.get, self._inner.close
        self.calls: dict[str, list[Call]] = {}

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        outputs = self._inner.run(stage, inputs, constants)
        if stage in STAGES:
            graph = self._manifest.graph(stage, constants or {})
            given = {
                spec.name: np.array(self.get(inputs[spec.name]))
                if spec.name in inputs
                else np.array([(constants or {})[spec.name]], np.int64)
                for spec in graph.inputs
            }
            self.calls.setdefault(graph.name, []).append((given, np.array(self.get(outputs[graph.outputs[0].name]))))
        return outputs


def recorded(bundle: Bundle, count: int, seed: int) -> dict[str, list[Call]]:
    """The calls of `count` pictures of evenly spread classes, by graph."""
    recorder = Recorder(bundle)
    Pipeline(bundle, recorder).generate(spread_subjects(bundle.manifest, count), range(seed, seed + count))
    return recorder.calls


def errors(path: Path, calls: Sequence[Call]) -> tuple[float, float]:
    """Relative error of a graph over all calls, and of the worst call."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    squares = [
        (float(((session.run(None, given)[0] - wanted) ** 2).sum()), float((wanted**2).sum()))
        for given, wanted in calls
    ]
    off, of = (sum(column) for column in zip(*squares, strict=True))
    return (off / of) ** 0.5, max((a / b) ** 0.5 for a, b in squares)


def products_with_weights(path: Path) -> list[MatMul]:
    """All matrix products with a constant weight."""
    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {one.name for one in graph.initializer}
    return [MatMul(n.name, n.input[0]) for n in graph.node if n.op_type in MATRICES and n.input[1] in weights]


def static(path: Path, target: Path, calls: Sequence[Call], method: str, outputs: bool, **options: Any) -> None:
    """ONNX Runtime's quantize_static with its own calibrator, over calls of one number of rows, which it needs."""
    from onnxruntime import quantization

    sizes = [sum(array.size for array in given.values()) for given, _ in calls]
    feed = iter([given for (given, _), size in zip(calls, sizes, strict=True) if size == max(sizes)])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(feed, None)

    own = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, **options}
    if not outputs:
        own["OpTypesToExcludeOutputQuantization"] = list(MATRICES)
    # It prints what it does.
    with contextlib.redirect_stdout(None):
        quantization.quantize_static(
            str(path), str(target), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=list(MATRICES), nodes_to_quantize=[one.node for one in products_with_weights(path)],
            activation_type=quantization.QuantType.QInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=getattr(quantization.CalibrationMethod, method), extra_options=own,
        )  # fmt: skip


def with_nncf(path: Path, target: Path, calls: Sequence[Call], smooth: float, ranges: str | None) -> None:
    """NNCF's quantiser on the same products, without bias correction, which does not run on the transformer."""
    import nncf
    from nncf.quantization import advanced_parameters as advanced
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    model = onnx.load(str(path))
    keep = {one.node for one in products_with_weights(path) if "index_cond_embed" not in one.node}
    settings = advanced.AdvancedQuantizationParameters(disable_bias_correction=True)
    settings.weights_quantization_params = advanced.QuantizationParameters(per_channel=True)
    settings.smooth_quant_alphas = advanced.AdvancedSmoothQuantParameters(matmul=smooth, convolution=-1)
    if ranges is not None:
        settings.activations_range_estimator_params = getattr(RangeEstimatorParametersSet, ranges)
    nodes = model.graph.node
    left = nncf.IgnoredScope(
        names=[node.name for node in nodes if node.op_type in MATRICES and node.name not in keep],
        types=sorted({node.op_type for node in nodes} - set(MATRICES)), validate=False,
    )  # fmt: skip
    data = nncf.Dataset([given for given, _ in calls])
    made = nncf.quantize(
        model, data, subset_size=len(calls), model_type=nncf.ModelType.TRANSFORMER, ignored_scope=left,
        preset=nncf.QuantizationPreset.PERFORMANCE, advanced_parameters=settings,
    )  # fmt: skip
    onnx.save(made, str(target))


def rows(
    bundle: Bundle, graph: Graph, calls: Sequence[Call], ranges: Mapping[str, float], folder: Path, nncf: bool
) -> Iterator[tuple[str, Path]]:
    """Name and file of every quantised graph; a file is valid until the next one is made."""
    source, target = bundle.path / graph.file, folder / "quantised.onnx"
    few = list(calls[:: max(1, len(calls) // 80)])
    for name, method, outputs, options in (
        ("quantize_static, min-max, outputs too", "MinMax", True, {}),
        ("quantize_static, min-max", "MinMax", False, {}),
        ("quantize_static, percentile 99.99", "Percentile", False, {"CalibPercentile": 99.99}),
        ("quantize_static, percentile 99.999", "Percentile", False, {"CalibPercentile": 99.999}),
        ("quantize_static, entropy", "Entropy", False, {}),
    ):
        static(source, target, few, method, outputs, **options)
        yield name, target
    for name, smooth, estimator in (
        ("NNCF, defaults", 0.95, None), ("NNCF, min-max, SmoothQuant 0.95", 0.95, "MINMAX"),
        ("NNCF, min-max, SmoothQuant 0.7", 0.7, "MINMAX"), ("NNCF, min-max, no SmoothQuant", -1.0, "MINMAX"),
    ) if nncf else ():  # fmt: skip
        with_nncf(source, target, few, smooth, estimator)
        yield name, target
    every = [one for one in products_with_weights(source) if one.activation in ranges]
    taken = {one.node for one in matmuls_of(source, graph, bundle.manifest.model.channels)}
    ways = [("least squares, all products", every)]
    ways += [(f"  without {one.node}", [o for o in every if o is not one]) for one in every if one.node not in taken]
    ways.append(("least squares, far export's products", [one for one in every if one.node in taken]))
    for name, chosen in ways:
        onnx.save(quantize_graph(onnx.load(str(source)), chosen, ranges), str(target))
        yield name, target


@click.command(help=__doc__)
@click.argument("path", metavar="FP32_BUNDLE", type=click.Path(path_type=Path))
@click.option("--calibrate", "count", type=int, default=16, show_default=True, help="Pictures for calibration.")
@click.option("--pictures", type=int, default=8, show_default=True, help="Pictures for the errors.")
@click.option("--nncf", is_flag=True, help="Compare NNCF too.")
def main(path: Path, count: int, pictures: int, nncf: bool) -> None:
    logging.disable(logging.WARNING)
    bundle = open_bundle(path)
    calls, judged = recorded(bundle, count, 1 << 20), recorded(bundle, pictures, 0)
    graphs = [graph for graph in bundle.manifest.graphs if graph.name in judged]
    watched = {
        graph.name: list(dict.fromkeys(one.activation for one in products_with_weights(path / graph.file)))
        for graph in graphs
    }
    ranges = calibrate(bundle, watched, count, lambda line: click.echo(line, err=True))
    click.echo("| graph | quantiser | all calls | worst call |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as aside:
        for graph in graphs:
            ways = rows(bundle, graph, calls[graph.name], ranges[graph.name], Path(aside), nncf)
            for name, target in ways:
                whole, worst = errors(target, judged[graph.name])
                click.echo(f"| {graph.name} | {name} | {whole:.4f} | {worst:.4f} |")


if __name__ == "__main__":
    main()
