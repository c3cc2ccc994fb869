"""INT8 bundles: what is quantised and what is not, that engines take them, and that what is broken is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from far_export.onnx.calibration import BINS, CalibrationEngine, Histogram
from far_export.onnx.quantize import QUANTIZED_OPERATORS, TOLERANCE, matmuls_of, quantize_bundle
from far_export.verify.parity import SampleInputs, compare_engines
from far_export.verify.results import Report
from far_runtime.bundle import WEIGHTS, Bundle, open_bundle, write_manifest
from far_runtime.conditioning.subjects import default_subjects
from far_runtime.engines import open_engine
from far_runtime.engines.base import EngineOptions
from far_runtime.errors import CheckFailed, FarError
from far_runtime.sampling.settings import resolve_settings

if TYPE_CHECKING:
    from conftest import Tiny

ONE = EngineOptions(threads=1)


@pytest.fixture(scope="module", params=["far", "mask", "mar", "t2i", "var"])
def pair(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """A tiny FP32 bundle of a system and the same in INT8."""
    folder = tmp_path_factory.mktemp(request.param)
    bundles = {"far": "bundle", "mask": "masked_bundle", "mar": "mar_bundle", "t2i": "t2i_bundle", "var": "var_bundle"}
    source = open_bundle(getattr(tiny, bundles[request.param]))
    return source, quantised(source, folder / "int8")


def quantised(source: Bundle, folder: Path, count: int = 2) -> Bundle:
    shutil.copytree(source.path, folder, ignore=shutil.ignore_patterns("engines"))
    write_manifest(folder, quantize_bundle(folder, source.manifest, count, lambda line: None))
    return open_bundle(folder)


def lockstep(source: Bundle, bundle: Bundle, engine: str) -> Report:
    """Every stage of the INT8 bundle against the FP32 one's, on the same inputs."""
    reference, candidate = open_engine(source, "onnxruntime", ONE), open_engine(bundle, engine, ONE)
    try:
        inputs = SampleInputs(default_subjects(bundle.manifest, 1), [0], resolve_settings(bundle.manifest))
        return compare_engines(bundle, reference, candidate, inputs)
    finally:
        reference.close()
        candidate.close()


def test_every_system_runs_in_int8_and_its_stages_stay_close(pair: tuple[Bundle, Bundle]) -> None:
    for engine in ("onnxruntime", "openvino"):
        if engine == "openvino":
            pytest.importorskip("openvino")
        report = lockstep(*pair, engine)
        assert all(result.passed for result in report.stages), (engine, report.failures)
        changed = [result for result in report.stages if result.graph in graphs_in_int8(pair[1])]
        assert all(result.tolerance == TOLERANCE for result in changed)
        assert max(result.error for result in changed) > 1e-4, "nothing was rounded"


def test_the_manifest_says_int8_of_what_was_quantised_and_nothing_else(pair: tuple[Bundle, Bundle]) -> None:
    source, bundle = pair
    assert bundle.manifest.precision == "int8"
    stages = {graph.stage for graph in bundle.manifest.graphs if graph.precision == "int8"}
    assert "decode" in stages and stages <= {"transformer", "denoise", "logits", "decode"}
    for before, after in zip(source.manifest.graphs, bundle.manifest.graphs, strict=True):
        if after.precision == "fp32":
            assert after == before
            assert operators(bundle, after.file)["QuantizeLinear"] == 0


def test_weights_are_int8_by_channel_and_activations_symmetric(pair: tuple[Bundle, Bundle]) -> None:
    _, bundle = pair
    for name in graphs_in_int8(bundle):
        model = onnx.load(str(bundle.path / f"{name}.onnx")).graph
        arrays = {one.name: onnx.numpy_helper.to_array(one) for one in model.initializer}
        makers = {output: node for node in model.node for output in node.output}
        seen = 0
        for node in model.node:
            maker = makers.get(node.input[1]) if node.op_type in QUANTIZED_OPERATORS else None
            if maker is None or maker.op_type != "DequantizeLinear":
                continue
            weight, scale, zero = (arrays[name] for name in maker.input)
            axis = maker.attribute[0].i
            assert weight.dtype == np.int8 and scale.shape == (weight.shape[axis],) and not zero.any()
            activation = makers[makers[node.input[0]].input[0]]
            assert activation.op_type == "QuantizeLinear"
            assert arrays[activation.input[1]].shape == () and arrays[activation.input[2]] == 0
            assert arrays[activation.input[2]].dtype == np.int8
            seen += 1
        assert seen, name


def test_the_weight_file_holds_every_tensor_once_and_nothing_else(pair: tuple[Bundle, Bundle]) -> None:
    _, bundle = pair
    places: dict[int, int] = {}
    for graph in bundle.manifest.graphs:
        for tensor in onnx.load(str(bundle.path / graph.file), load_external_data=False).graph.initializer:
            if tensor.external_data:
                entry = {item.key: item.value for item in tensor.external_data}
                assert entry["location"] == WEIGHTS
                assert places.setdefault(int(entry["offset"]), int(entry["length"])) == int(entry["length"])
    end = 0
    for offset, length in sorted(places.items()):
        assert 0 <= offset - end < 4096, "bytes that no graph reads"
        end = offset + length
    assert end == (bundle.path / WEIGHTS).stat().st_size
    assert not [path for path in bundle.path.iterdir() if path.name.startswith(".")]


def test_graphs_of_single_levels_share_their_int8_weights(tiny: Tiny, tmp_path: Path) -> None:
    source = open_bundle(tiny.masked_bundle)
    assert len([graph for graph in source.manifest.graphs if graph.stage == "transformer"]) == 2
    bundle = quantised(source, tmp_path / "int8")
    first, second = (
        {
            item.value
            for tensor in onnx.load(str(path), load_external_data=False).graph.initializer
            for item in tensor.external_data
            if item.key == "offset" and tensor.data_type == onnx.TensorProto.INT8
        }
        for path in sorted(bundle.path.glob("transformer*.onnx"))
    )
    assert first and first == second


def test_what_touches_the_latents_or_is_the_same_for_all_rows_stays_fp32(tiny: Tiny) -> None:
    bundle = open_bundle(tiny.bundle)
    graph = bundle.manifest.graph("denoise", {})
    path = bundle.path / graph.file
    model = onnx.load(str(path), load_external_data=False).graph
    shapes = {one.name: tuple(one.dims) for one in model.initializer}
    chosen = {product.node for product in matmuls_of(path, graph, channels=4)}
    left = [shapes[n.input[1]] for n in model.node if n.op_type in ("MatMul", "Gemm") and n.name not in chosen]
    # The timestep's two layers (256 frequencies to width 32), the projection of 4 channels, the final layer to 8.
    assert sorted(left) == sorted([(32, 256), (32, 32), (4, 32), (32, 8)])


def test_the_decoder_reads_latents_and_gives_pixels_in_fp32(tiny: Tiny) -> None:
    bundle = open_bundle(tiny.bundle)
    graph = bundle.manifest.graph("decode", {})
    model = onnx.load(str(bundle.path / graph.file), load_external_data=False).graph
    convolutions = [node.name for node in model.node if node.op_type == "Conv"]
    chosen = [product.node for product in matmuls_of(bundle.path / graph.file, graph, channels=4)]
    # What reads the 4 channels of the latents: post_quant_conv and conv_in. What gives the pixels: conv_out.
    assert chosen == convolutions[2:-1]


def test_a_broken_quantisation_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = open_bundle(tiny.bundle)
    bundle = quantised(source, tmp_path / "int8")
    path = bundle.path / "denoise.onnx"
    model = onnx.load(str(path), load_external_data=False)
    scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in scales:  # as if calibrated on far too small values
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) / 50, tensor.name))
    onnx.save(model, str(path))
    report = lockstep(source, bundle, "onnxruntime")
    assert not report.passed
    assert any("denoise" in failure and "relative error" in failure for failure in report.failures)


def test_calibration_looks_at_every_level_and_spreads_over_the_steps(tiny: Tiny) -> None:
    source = open_bundle(tiny.bundle)
    watched = {"denoise": [product.activation for product in matmuls_of(
        source.path / "denoise.onnx", source.manifest.graph("denoise", {}), 4)]}  # fmt: skip
    from far_runtime.pipeline import Pipeline

    engine = CalibrationEngine(source, watched, {"denoise": 2})
    with Pipeline(source, engine) as pipeline:
        made = pipeline.generate([1], [0], save_levels=True)
    calls = len(made.step_names) * 3  # three diffusion steps at every level
    assert engine.observed == {"denoise": -(-calls // 2)}
    assert all(histogram.counts.any() for histogram in engine.histograms["denoise"].values())
    assert not list(source.path.glob(".*calibration*"))


def test_a_histogram_finds_the_range_with_the_least_error() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values[0] = 100.0  # one outlier, that is worth clipping
    histogram = Histogram()
    for part in np.array_split(values, 7):
        histogram.add(part)
    assert histogram.counts.sum() == values.size and histogram.counts.shape == (BINS,)

    def error(bound: float) -> float:
        step = bound / 127
        return float(np.square(values - np.clip(np.round(values / step), -127, 127) * step)[1:].mean())

    assert 3 < histogram.range() < 100
    assert error(histogram.range()) < error(100.0)


def test_a_histogram_grows_without_losing_counts_and_refuses_nan() -> None:
    histogram = Histogram()
    histogram.add(np.zeros((2, 3), np.float32))
    histogram.add(np.zeros((0, 3), np.float32))
    histogram.add(np.array([1.0, -3.0], np.float32))
    histogram.add(np.array([40.0], np.float32))
    assert histogram.counts.sum() == 9 and histogram.top >= 40
    with pytest.raises(FarError, match="NaN or infinity"):
        histogram.add(np.array([np.nan], np.float32))


def test_a_bundle_without_products_to_quantise_is_refused_and_stays_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    manifest = open_bundle(folder).manifest
    wide = replace(manifest, model=replace(manifest.model, channels=10_000))
    with pytest.raises(CheckFailed, match="no matrix product"):
        quantize_bundle(folder, wide, 1, lambda line: None)
    assert open_bundle(folder).manifest == manifest


def test_int8_without_onnxruntime_says_what_to_install(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FarError, match=r"pip install 'far-deploy\[cpu\]'"):
        CalibrationEngine(open_bundle(tiny.bundle), {}, {})


def test_openvino_computes_the_products_in_int8(tiny: Tiny, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    if "INT8" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no int8 products")
    bundle = quantised(open_bundle(tiny.bundle), tmp_path / "int8")
    for stage, layer in (("denoise", "FullyConnected"), ("decode", "Convolution")):
        graph = bundle.manifest.graph(stage, {})
        compiled = core.compile_model(str(bundle.path / graph.file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        kinds = Counter(
            operation.get_rt_info()["runtimePrecision"].astype(str)
            for operation in compiled.get_runtime_model().get_ops()
            if operation.get_rt_info()["layerType"].astype(str) == layer
        )
        products = matmuls_of(tiny.bundle / graph.file, graph, 4)
        assert products and kinds["i8"] + kinds["u8"] == len(products), (stage, kinds)


@pytest.mark.slow
def test_tensorrt_rtx_builds_every_quantised_graph(
    pair: tuple[Bundle, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("polygraphy")
    pytest.importorskip("tensorrt_rtx")
    from far_runtime.engines.tensorrt.builder.build import build_engines
    from far_runtime.engines.tensorrt.builder.options import BuildOptions

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    bundle = open_bundle(shutil.copytree(pair[1].path, tmp_path / "bundle"))
    engine = build_engines(bundle, "tensorrt-rtx", BuildOptions(targets=("sm89",)))
    for name in graphs_in_int8(bundle):
        assert engine.notes[name]["products"]["int8"] > 0


def graphs_in_int8(bundle: Bundle) -> list[str]:
    return [graph.name for graph in bundle.manifest.graphs if graph.precision == "int8"]


def operators(bundle: Bundle, file: str) -> Counter[str]:
    model = onnx.load(str(bundle.path / file), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)
