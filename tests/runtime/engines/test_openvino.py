"""OpenVINO draws what ONNX Runtime draws."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from far_runtime.bundle import open_bundle
from far_runtime.engines import open_engine
from far_runtime.engines.base import EngineOptions
from far_runtime.errors import FarError
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.solvers import COEFFICIENTS

pytest.importorskip("openvino", reason="openvino is not installed on this machine")


@pytest.mark.parametrize("bundle", ["bundle", "masked_bundle"])
def test_the_same_pictures_as_onnxruntime(tiny: Any, bundle: str) -> None:
    made = []
    for engine in ("onnxruntime", "openvino"):
        with Pipeline.from_bundle(getattr(tiny, bundle), engine, threads=1) as pipeline:
            made.append(pipeline.generate([1, 2, 3], [0, 1, 2], batch_size=2))
    reference, other = made
    error = np.linalg.norm(other.latents - reference.latents) / np.linalg.norm(reference.latents)
    assert error < 1e-5
    assert np.abs(other.images.astype(int) - reference.images).max() <= 1
    assert other.settings[0].engine == "openvino:cpu"


def test_arrays_of_earlier_calls_stay_as_they_were(tiny: Any) -> None:
    """A request's own output tensor would be overwritten by the next call."""
    engine = open_engine(open_bundle(tiny.bundle), "openvino", EngineOptions(threads=1))
    grid = engine.put(np.zeros((1, 16, 4), np.float32))
    first = engine.run("decode", {"latents": grid})["pixels"]
    before = engine.get(first).copy()
    second = engine.run("decode", {"latents": engine.put(np.ones((1, 16, 4), np.float32))})["pixels"]
    assert np.array_equal(engine.get(first), before)
    assert not np.array_equal(engine.get(second), before)


def test_put_copies(tiny: Any) -> None:
    engine = open_engine(open_bundle(tiny.bundle), "openvino", EngineOptions(threads=1))
    array = np.zeros(4, np.float32)
    there = engine.put(array)
    array += 1
    assert engine.get(there).tolist() == [0, 0, 0, 0]


def test_nothing_is_copied_between_stages(tiny: Any) -> None:
    """What a stage returns is the memory that its request wrote, and the next stage reads that memory."""
    engine: Any = open_engine(open_bundle(tiny.bundle), "openvino", EngineOptions(threads=1))
    inputs = {"latents": np.zeros((1, 16, 4), np.float32), "labels": np.zeros(2, np.int64)}
    given = {name: engine.put(array) for name, array in inputs.items()}
    head = engine.run("transformer", given, {"level": 0, "lowpass": 0})["condition"]
    request = engine._loaded["transformer"].request
    assert request.get_tensor("condition").data.ctypes.data == head.data.ctypes.data
    state = engine.put(np.ones((1, 16, 4), np.float32))
    scalars = {
        "timestep": np.ones(1, np.float32),
        "coefficients": np.ones(len(COEFFICIENTS), np.float32),
        "guidance": np.ones(1, np.float32),
    }
    more = {name: engine.put(array) for name, array in scalars.items()}
    engine.run("denoise", {"state": state, "condition": head, "noise": state, "history": state, **more})
    request = engine._loaded["denoise"].request
    assert request.get_tensor("condition").data.ctypes.data == head.data.ctypes.data
    assert request.get_tensor("state").data.ctypes.data == state.data.ctypes.data


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine over attention as VAR has it: the number of keys, those so far and the new ones, is no input's."""
    torch = pytest.importorskip("torch", reason="torch makes the graph")

    from far_export.stages.stage import Input, Stage
    from far_runtime.bundle import TensorSpec
    from golden.stage_engine import engine_of

    class Attention(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any, past: Any) -> Any:
            keys = torch.cat([past, x], dim=2)
            weights = torch.softmax(x @ keys.transpose(2, 3), dim=-1)
            return weights @ keys, keys

    heads = ("rows", 2)
    stage = Stage(
        "attend", Attention(), (Input("x", (*heads, "tokens", 8)), Input("past", (*heads, "past", 8))),
        (TensorSpec("y", "float32", (*heads, "tokens", 8)), TensorSpec("next", "float32", (*heads, "all", 8))),
        {"rows": (1, 2, 4), "tokens": (1, 9, 64), "past": (0, 14, 128)},
    )  # fmt: skip
    yield engine_of([stage], "openvino", tmp_path_factory.mktemp("keys") / "bundle")


def test_outputs_of_a_size_that_no_input_has_are_right_and_not_copied(keys: Any) -> None:
    """And stay so: VAR hands the keys of one scale to the next, and a length must not meet another length's kernel."""
    rng = np.random.default_rng(0)
    past = np.zeros((2, 2, 0, 8), np.float32)
    there, kept = keys.put(past), []
    for side in (1, 2, 3, 4, 5, 6):
        x = rng.normal(size=(2, 2, side * side, 8)).astype(np.float32)
        out = keys.run("attend", {"x": keys.put(x), "past": there})
        past = np.concatenate([past, x], axis=2)
        scores = np.exp(x @ past.transpose(0, 1, 3, 2))
        np.testing.assert_allclose(
            keys.get(out["y"]), scores / scores.sum(-1, keepdims=True) @ past, rtol=1e-4, atol=1e-5
        )
        request = keys._loaded["attend"].request
        assert request.get_tensor("next").data.ctypes.data == out["next"].data.ctypes.data
        there = out["next"]
        kept.append((there, past))
    for tensor, expected in kept:
        np.testing.assert_array_equal(keys.get(tensor), expected)


def test_batches_of_any_size_in_any_order(tiny: Any) -> None:
    with Pipeline.from_bundle(tiny.bundle, "openvino", threads=1) as pipeline:
        alone = {seed: pipeline.generate([seed], [seed]).latents[0] for seed in range(5)}
        for size in (3, 1, 5, 2):
            made = pipeline.generate(list(range(size)), list(range(size)), batch_size=size).latents
            for seed in range(size):
                np.testing.assert_allclose(made[seed], alone[seed], rtol=1e-3, atol=1e-4)


def test_modes_and_pinning_reach_openvino(tiny: Any) -> None:
    engine: Any = open_engine(
        open_bundle(tiny.bundle), "openvino", EngineOptions(threads=1, mode="throughput", pinning=False)
    )
    engine.run("decode", {"latents": engine.put(np.zeros((1, 16, 4), np.float32))})
    compiled = engine._loaded["decode"].request.get_compiled_model()
    assert str(compiled.get_property("PERFORMANCE_HINT")).endswith("THROUGHPUT")
    assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


@pytest.mark.parametrize(
    ("precision", "can", "asked", "name"),
    [
        ("fp32", ["FP32", "BF16"], "", "openvino:cpu"),
        ("fp32", ["FP32", "BF16"], ":bf16", "openvino:cpu:bf16"),
        ("bf16", ["FP32", "BF16"], "", "openvino:cpu"),
        ("bf16", ["FP32", "BF16"], ":bf16", "openvino:cpu:bf16"),
        ("bf16", ["FP32"], "", "openvino:cpu"),
        ("fp16", ["FP32", "BF16"], "", "openvino:cpu:f32"),
        ("fp16", ["FP32", "FP16"], "", "openvino:cpu:f16"),
        ("int8", ["FP32", "BF16", "INT8"], "", "openvino:cpu"),
    ],
)
def test_the_name_says_what_is_computed_in(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, precision: str, can: list[str], asked: str, name: str
) -> None:
    import openvino

    class Core:
        available_devices = ("CPU",)

        def get_property(self, device: str, name: str) -> list[str]:
            return can

    monkeypatch.setattr(openvino, "Core", Core)
    bundle = open_bundle(tiny.bundle)
    bundle = replace(bundle, manifest=replace(bundle.manifest, precision=precision))
    assert open_engine(bundle, "openvino:cpu" + asked).name == name


def test_a_precision_that_the_device_lacks_is_an_error(tiny: Any) -> None:
    import openvino

    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    lacking = [hint for hint, name in {"bf16": "BF16", "f16": "FP16"}.items() if name not in can]
    if not lacking:
        pytest.skip("this processor computes in all of them")
    with pytest.raises(FarError, match=rf"does not compute in {lacking[0]}; use openvino:cpu:f32"):
        open_engine(open_bundle(tiny.bundle), f"openvino:cpu:{lacking[0]}")


def test_like_repeats_a_picture(tiny: Any) -> None:
    with Pipeline.from_bundle(tiny.bundle, "openvino", threads=1) as pipeline:
        made = pipeline.generate([4], [7])
        assert np.array_equal(pipeline.like(made.settings[0]).images, made.images)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("openvino:abacus", "no such device; it has"),
        ("openvino:cpu:f64", "unknown precision; known: f32, bf16, f16"),
    ],
)
def test_what_cannot_be_had_is_said(tiny: Any, name: str, said: str) -> None:
    with pytest.raises(FarError, match=said):
        open_engine(open_bundle(tiny.bundle), name)


def test_a_broken_graph_is_named(tiny: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(tiny.bundle, folder)
    (folder / "decode.onnx").write_bytes(b"no graph at all" * 10)
    engine = open_engine(open_bundle_unchecked(folder), "openvino")
    with pytest.raises(FarError, match=r"decode\.onnx: openvino .* does not compile it for CPU"):
        engine.run("decode", {"latents": engine.put(np.zeros((1, 16, 4), np.float32))})


def open_bundle_unchecked(folder: Path) -> Any:
    """A bundle whose files were not compared with the manifest, as after a change on disk."""
    from far_runtime.bundle import Bundle
    from far_runtime.bundle import read_manifest as read

    return Bundle(folder, read(folder))


def test_what_far_build_compiled_is_loaded_and_draws_the_same_bits(bundle_copy: Path, far: Any) -> None:
    with Pipeline.from_bundle(bundle_copy, "openvino", threads=1) as pipeline:
        expected = pipeline.generate([3], [5])
    built = far("build", bundle_copy, "--engine", "openvino", "--threads", 1)
    assert built.code == 0, built.err
    assert built.out.startswith("compiled transformer\n")
    (listed,) = json.loads(far("inspect", bundle_copy, "--json").out)["engines"]
    assert (listed["library"], listed["misfit"]) == ("openvino", "")
    engine = open_engine(open_bundle(bundle_copy), "openvino", EngineOptions(threads=1))
    for graph in open_bundle(bundle_copy).manifest.graphs:  # compiled anew, it would need the graph's file
        (bundle_copy / graph.file).unlink()
    with Pipeline(open_bundle_unchecked(bundle_copy), engine) as pipeline:
        made = pipeline.generate([3], [5])
    assert np.array_equal(made.images, expected.images)
    assert np.array_equal(made.latents, expected.latents)


def test_what_was_compiled_for_other_settings_is_not_loaded(bundle_copy: Path, far: Any) -> None:
    """Here: another number of threads. Then the graphs are compiled as ever."""
    assert far("build", bundle_copy, "--engine", "openvino", "--threads", 1).code == 0
    engine = open_engine(open_bundle(bundle_copy), "openvino", EngineOptions(threads=2))
    (bundle_copy / "decode.onnx").write_bytes(b"no graph at all" * 10)
    with pytest.raises(FarError, match=r"decode\.onnx: openvino .* does not compile it"):
        engine.run("decode", {"latents": engine.put(np.zeros((1, 16, 4), np.float32))})


def test_a_changed_byte_in_what_was_compiled_is_not_loaded(bundle_copy: Path, far: Any) -> None:
    assert far("build", bundle_copy, "--engine", "openvino", "--threads", 1).code == 0
    (blob,) = (bundle_copy / "engines").glob("*/decode.blob")
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    engine = open_engine(open_bundle(bundle_copy), "openvino", EngineOptions(threads=1))
    (bundle_copy / "decode.onnx").write_bytes(b"no graph at all" * 10)
    with pytest.raises(FarError, match=r"decode\.onnx"):
        engine.run("decode", {"latents": engine.put(np.zeros((1, 16, 4), np.float32))})
