"""OpenVINO draws what ONNX Runtime draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from far_runtime.bundle import open_bundle
from far_runtime.engines import open_engine
from far_runtime.engines.base import EngineOptions
from far_runtime.errors import FarError
from far_runtime.pipeline import Pipeline

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
    from far_runtime.bundle import _read_manifest as read

    return Bundle(folder, read(folder))
