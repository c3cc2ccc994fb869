"""far bench's clock around the stages of the TensorRT engine, on the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from far_runtime.engines.timed import SampledEngine, TimedEngine, timed
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.flops import picture_cost
from far_runtime.sampling.settings import plan_of, resolve_settings


def test_stages_are_timed_one_by_one_and_captures_go_on(simulate: Any, tiny: Any) -> None:
    simulation = simulate(early=0)  # the device works when it is waited for, and not before
    with simulation.pipeline(tiny.bundle) as pipeline:
        whole = [pipeline.generate([0, 1], [0, 1]) for _ in range(3)][-1]
        launches, waits = simulation.cuda.launches, []
        engine = pipeline.engine
        wait = engine.synchronize
        engine.synchronize = lambda: waits.append(wait())
        clocked = TimedEngine(engine)
        staged = Pipeline(pipeline.bundle, clocked).generate([0, 1], [0, 1])
        assert np.array_equal(staged.images, whole.images) and np.array_equal(staged.latents, whole.latents)
        assert simulation.cuda.launches == launches  # no replay behind a stage's back
        assert len(waits) == sum(map(len, clocked.seconds.values()))
        manifest = pipeline.bundle.manifest
        settings = resolve_settings(manifest)
        assert {*picture_cost(manifest, plan_of(manifest, settings))} <= {*clocked.seconds}
        pipeline.generate([0, 1], [2, 3])
        assert simulation.cuda.launches == launches + 1


def test_a_server_times_some_generations_and_leaves_the_others_to_the_graphs(simulate: Any, tiny: Any) -> None:
    simulation = simulate(early=0)
    with simulation.pipeline(tiny.bundle) as pipeline:
        whole = pipeline.generate([0, 1], [0, 1])
        sampled = timed(pipeline.engine)
        assert isinstance(sampled, SampledEngine)
        sampled = SampledEngine(pipeline.engine, every=3)
        served = Pipeline(pipeline.bundle, sampled)
        launches, noted = [], []
        for _ in range(6):
            sampled.seconds.clear()
            before = simulation.cuda.launches
            made = served.generate([0, 1], [0, 1])
            assert np.array_equal(made.images, whole.images) and np.array_equal(made.latents, whole.latents)
            launches.append(simulation.cuda.launches - before)
            noted.append("denoise" in sampled.seconds)
        assert noted == [True, False, False, True, False, False]
        assert launches == [0, 1, 1, 0, 1, 1]


def test_an_engine_without_graphs_is_timed_always(tiny: Any) -> None:
    with Pipeline.from_bundle(tiny.bundle, "onnxruntime", threads=1) as pipeline:
        assert type(timed(pipeline.engine)) is TimedEngine
