"""far bench's clock around the stages of the TensorRT engine, on the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from far_runtime.bench.timing import TimedEngine
from far_runtime.cost import picture_cost
from far_runtime.defaults import plan_of, settings_of
from far_runtime.pipeline import Pipeline


def test_stages_are_timed_one_by_one_and_captures_go_on(simulate: Any, tiny: Any) -> None:
    simulation = simulate(early=0)  # the device works when it is waited for, and not before
    with simulation.pipeline(tiny.bundle) as pipeline:
        whole = [pipeline.generate([0, 1], [0, 1]) for _ in range(3)][-1]
        launches, waits = simulation.cuda.launches, []
        engine = pipeline.engine
        wait = engine.synchronize
        engine.synchronize = lambda: waits.append(wait())
        timed = TimedEngine(engine)
        staged = Pipeline(pipeline.bundle, timed).generate([0, 1], [0, 1])
        assert np.array_equal(staged.images, whole.images) and np.array_equal(staged.latents, whole.latents)
        assert simulation.cuda.launches == launches  # no replay behind a stage's back
        assert len(waits) == sum(map(len, timed.seconds.values()))
        manifest = pipeline.bundle.manifest
        settings = settings_of(manifest)
        assert {*picture_cost(manifest, plan_of(manifest, settings))} <= {*timed.seconds}
        pipeline.generate([0, 1], [2, 3])
        assert simulation.cuda.launches == launches + 1
