"""Pictures through the TensorRT engine on the simulator: ONNX Runtime's, bit for bit, captured or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from far_runtime.engines.base import EngineOptions
from far_runtime.generation import Generation
from far_runtime.pipeline import Pipeline
from far_runtime.subjects import takes_text

PLAIN = EngineOptions(cuda_graph=False)


def subjects_of(pipeline: Pipeline, count: int) -> list[Any]:
    names = ["a red apple", "the cat", "", "a lion and the city", "green", "of the street"]
    return names[:count] if takes_text(pipeline.bundle.manifest) else list(range(count))


def same(one: Generation, other: Generation) -> bool:
    return np.array_equal(one.images, other.images) and np.array_equal(one.latents, other.latents)


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("early", [0, 0.3, 1], ids=["late", "by_chance", "at_once"])
def test_every_system_draws_what_onnxruntime_draws(
    simulate: Any, system_bundle: Path, early: float, library: str
) -> None:
    """Uncaptured, in capture and replayed, whenever the device does its work."""
    simulation = simulate(library, early=early)
    with Pipeline.from_bundle(system_bundle, threads=1) as reference, simulation.pipeline(system_bundle) as pipeline:
        subjects = subjects_of(reference, 2)
        for seeds in ([0, 1], [2, 3], [4, 5], [6, 7]):
            assert same(pipeline.generate(subjects, seeds), reference.generate(subjects, seeds))
        assert simulation.cuda.launches == 3
        assert pipeline.engine.name == library
    assert simulation.cuda.live == {"device": 0, "pinned": 0}
