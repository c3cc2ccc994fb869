"""--low-memory: one graph at a time, and the same pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from far_runtime.bundle import open_bundle
from far_runtime.engines.base import EngineOptions
from far_runtime.pipeline import Pipeline


@pytest.mark.parametrize(("engine", "held"), [("onnxruntime", "_sessions"), ("openvino", "_loaded")])
def test_one_graph_is_held_at_a_time_and_the_pictures_are_the_same(tiny: Any, engine: str, held: str) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    bundle = open_bundle(tiny.bundle)
    found = {}
    for low_memory in (False, True):
        with Pipeline.over(bundle, engine, EngineOptions(threads=1, low_memory=low_memory)) as pipeline:
            found[low_memory] = pipeline.generate([1, 2], [0, 1]).images
            graphs: Any = getattr(pipeline.engine, held)
            assert len(graphs) == 1 if low_memory else len(graphs) >= 3
    assert np.array_equal(found[True], found[False])
