"""What cannot be is said in words that mend it, and leaves the engine usable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from far_runtime.bundle import open_bundle
from far_runtime.engines.base import EngineOptions, run_generation
from far_runtime.engines.tensorrt import engine as tensorrt
from far_runtime.engines.tensorrt.engine import TensorRtEngine
from far_runtime.errors import FarError
from simulated_cuda import cudaError_t
from simulated_tensorrt import plan_of


@pytest.mark.parametrize(
    ("cuda", "fault", "said"),
    [
        (
            {},
            cudaError_t.cudaErrorInsufficientDriver,
            "no NVIDIA GPU can be used here .*driver version is insufficient",
        ),
        ({}, cudaError_t.cudaErrorNoDevice, "no CUDA-capable device.*use another engine"),
        ({"devices": 0}, None, "no NVIDIA GPU in this machine; use another engine"),
    ],
)
def test_without_a_gpu_another_engine_is_named(simulate: Any, tiny: Any, cuda: Any, fault: Any, said: str) -> None:
    simulation = simulate(**cuda)
    if fault:
        simulation.cuda.faults["cudaGetDeviceCount"] = fault
    with pytest.raises(FarError, match=said):
        simulation.engine(tiny.bundle)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"version": "10.3.0"}, r"does not load its engine \(The engine plan file is of version 10.3.0\).*far build"),
        (
            {"dtypes": {"condition": "HALF"}},
            r"condition of its engine is HALF, expected float32; build it again with: far",
        ),
        ({"host": ["timestep"]}, "wants input timestep on the host"),
        ({"renamed": {"pixels": "picture"}}, "has the outputs picture, expected pixels"),
    ],
)
def test_plans_that_do_not_fit_are_named(simulation: Any, tiny: Any, plan: Any, said: str) -> None:
    with pytest.raises(FarError, match=said):
        simulation.engine(tiny.bundle, **plan)


def test_a_damaged_plan_is_named(simulation: Any, tiny: Any) -> None:
    with pytest.raises(FarError, match=r"graph \w+: tensorrt-rtx .* does not load its engine \(.*magic tag\)"):
        TensorRtEngine(open_bundle(tiny.bundle, check=False), "tensorrt-rtx", lambda name: b"garbage")


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stubs alone can be imported too, as a package without anything in it."""
    from types import SimpleNamespace

    monkeypatch.setattr(tensorrt.importlib, "import_module", lambda name: SimpleNamespace())
    with pytest.raises(FarError, match=r"tensorrt is not installed; .*far-deploy\[tensorrt\].*--system-site-packages"):
        tensorrt.load_libraries("tensorrt")


def test_too_many_pictures_at_once_name_the_axis_and_the_range(simulation: Any, tiny: Any) -> None:
    profiles = {"denoise": [{"batch": (1, 32, 32)}], "transformer": [{"batch": (1, 2, 2), "rows": (1, 4, 4)}]}
    engine = simulation.engine(tiny.bundle, profiles=profiles)
    latents = np.zeros((3, 16, 4), np.float32)
    with pytest.raises(FarError) as caught:
        engine.run(
            "transformer",
            {"latents": engine.put(latents), "labels": engine.put(np.zeros(3, np.int64))},
            {"level": 0, "lowpass": 0, "count": 16},
        )
    assert "axis batch of latents is 3, its engine takes 1 to 2" in str(caught.value)
    assert "with batch_size" in str(caught.value) and "far build" in str(caught.value)


def test_the_profile_that_fits_is_chosen(simulation: Any, tiny: Any) -> None:
    decode = [{"batch": (1, 1, 1)}, {"batch": (2, 2, 2)}, {"batch": (1, 4, 8)}]
    engine = simulation.engine(tiny.bundle, profiles={"decode": decode})
    for batch in (1, 2, 3):
        pixels = engine.run("decode", {"latents": engine.put(np.zeros((batch, 16, 4), np.float32))})["pixels"]
        assert engine.get(pixels).shape == (batch, 16, 16, 3)
    with pytest.raises(FarError, match="axis batch of latents is 9, its engine takes 1 or 1 to 8 or 2"):
        engine.run("decode", {"latents": engine.put(np.zeros((9, 16, 4), np.float32))})


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((1, 16, 4), np.int64), r"latents is int64 \[1, 16, 4\], expected float32 \[batch, 16, 4\]"),
        (np.zeros((16, 4), np.float32), r"latents is float32 \[16, 4\], expected"),
    ],
)
def test_a_wrong_array_is_named(simulation: Any, tiny: Any, array: Any, said: str) -> None:
    engine = simulation.engine(tiny.bundle)
    with pytest.raises(FarError, match=said):
        engine.run("decode", {"latents": engine.put(array)})
    with pytest.raises(FarError, match="array of float64: graphs take float32, int64, uint8"):
        engine.put(np.zeros(3))


@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_a_full_device_says_how_much_was_asked(simulate: Any, tiny: Any, drawn_before: int) -> None:
    simulation = simulate(capacity=16 << 20)
    with simulation.pipeline(tiny.bundle) as pipeline:
        for seed in range(drawn_before):
            pipeline.generate([1], [seed])
        with pytest.raises(FarError, match=r"no room for .* more \(free: .* of 16 MiB\); use a smaller batch_size"):
            pipeline.engine.put(np.zeros(17 << 18, np.float32))
        pipeline.generate([1], [5])  # the failed call is not reported again by the next


def test_a_call_that_fails_is_named_with_cudas_words(simulation: Any, tiny: Any) -> None:
    with simulation.pipeline(tiny.bundle) as pipeline:
        simulation.cuda.faults["cudaMemcpyAsync"] = cudaError_t.cudaErrorInvalidValue
        with pytest.raises(FarError, match="cudaMemcpyAsync: invalid argument"):
            pipeline.generate([1], [0])
        simulation.cuda.faults.clear()
        assert pipeline.generate([1], [0]).images.any()


def test_an_engine_that_cannot_be_captured_names_the_option(simulation: Any, tiny: Any) -> None:
    with simulation.pipeline(tiny.bundle, capturable=False) as pipeline:
        pipeline.generate([1], [0])
        with pytest.raises(FarError, match=r"graph \w+ of this engine cannot be captured.*use no_cuda_graph"):
            pipeline.generate([1], [1])
    with simulation.pipeline(tiny.bundle, EngineOptions(cuda_graph=False), capturable=False) as pipeline:
        pipeline.generate([1], [0])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, FarError])
@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_a_generation_that_is_broken_off_spoils_nothing(
    simulation: Any, tiny: Any, pipelines: Any, monkeypatch: pytest.MonkeyPatch, kind: Any, drawn_before: int
) -> None:
    """Neither uncaptured nor in the middle of a capture or a replay."""
    reference, pipeline = pipelines(tiny.bundle)
    for seed in range(drawn_before):
        pipeline.generate([1], [seed])

    def broken(progress: Any) -> None:
        if progress.done == 4:
            raise kind("stop")

    with pytest.raises(kind):
        pipeline.generate([1], [7], on_progress=broken)
    for seed in range(3):
        assert np.array_equal(pipeline.generate([1], [seed]).images, reference.generate([1], [seed]).images)


def test_a_generation_that_reads_on_the_way_is_never_captured(simulation: Any, tiny: Any) -> None:
    """It runs as it comes, as often as it is asked for, and so does one on an array from before."""
    engine = simulation.engine(tiny.bundle)
    outside = engine.put(np.ones((1, 16, 4), np.float32))

    def reads(there: Any) -> Any:
        latents = there.put(np.ones((1, 16, 4), np.float32))
        assert there.get(latents).all()
        return there.run("decode", {"latents": latents})

    def on_outside(there: Any) -> Any:
        return there.run("decode", {"latents": outside})

    for make in (reads, on_outside):
        made = [run_generation(engine, make.__name__, make)["pixels"] for _ in range(4)]
        assert all(np.array_equal(one, made[0]) for one in made)
    assert simulation.cuda.launches == 0


def test_a_generation_under_the_wrong_key_is_recorded_anew(simulation: Any, tiny: Any) -> None:
    engine = simulation.engine(tiny.bundle)

    def of(batch: int, again: bool) -> Any:
        def make(there: Any) -> Any:
            latents = there.put(np.full((batch, 16, 4), 0.5, np.float32))
            if again:
                there.run("decode", {"latents": latents})
            return there.run("decode", {"latents": latents})

        return run_generation(engine, "the same", make)["pixels"]

    for batch, again in ((1, False), (2, False), (2, False), (1, False), (1, False), (1, False), (1, True), (1, True)):
        assert of(batch, again).shape == (batch, 16, 16, 3)


def test_stripped_plans_get_the_bundles_weights(simulation: Any, tiny: Any, bundle_copy: Path) -> None:
    with simulation.pipeline(tiny.bundle, stripped=True) as pipeline:
        assert pipeline.generate([1], [0]).images.any()
    built, other = (open_bundle(path, check=False) for path in (tiny.bundle, bundle_copy))
    graphs = {graph.name: graph for graph in built.manifest.graphs}
    with pytest.raises(FarError, match=r"graph \w+: its engine does not take the weights of .*\.onnx \(refitFromFile"):
        TensorRtEngine(other, "tensorrt-rtx", lambda name: plan_of(built, graphs[name], stripped=True))


def test_the_weight_budget_reaches_every_engine(simulation: Any, tiny: Any) -> None:
    for budget, expected in ((None, 5 << 20), (2, 2 << 20), (9, 5 << 20)):
        engine = simulation.engine(tiny.bundle, EngineOptions(weight_budget=budget), streamable=5 << 20)
        assert {one._engine.weight_streaming_budget_v2 for one in engine._executors.values()} == {expected}


def test_a_version_compatible_plan_is_loaded(simulation: Any, tiny: Any) -> None:
    with simulation.pipeline(tiny.bundle, version="10.3.0", version_compatible=True) as pipeline:
        assert pipeline.generate([1], [0]).images.any()


def test_scratch_memory_is_the_largest_and_taken_once(simulation: Any, tiny: Any) -> None:
    """All contexts share it: each would otherwise have asked for its own."""
    engine = simulation.engine(tiny.bundle, scratch=123456)
    assert simulation.cuda.allocated == [123456]
    engine.close()
    assert simulation.cuda.live["device"] == 0


def test_options_reach_the_engine() -> None:
    import click

    from far_runtime.cli.engine_options import engine_options, take_engine

    @click.command()
    @engine_options("x")
    def command(**options: Any) -> None:
        click.echo(repr(take_engine(options)))

    from click.testing import CliRunner

    out = CliRunner().invoke(command, ["--no-cuda-graph", "--weight-budget", "512"]).output
    assert "cuda_graph=False" in out and "weight_budget=512" in out
    assert "cuda_graph=True" in CliRunner().invoke(command, []).output
