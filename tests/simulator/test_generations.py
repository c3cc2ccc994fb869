"""Pictures through the TensorRT engine on the simulator: ONNX Runtime's, bit for bit, captured or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from far_runtime.bundle import open_bundle
from far_runtime.conditioning.subjects import takes_text
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.tensorrt.device_memory import BLOCK_BYTES
from far_runtime.generation import Generation
from far_runtime.pipeline import Pipeline

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
    with (
        Pipeline.from_bundle(system_bundle, "onnxruntime", threads=1) as reference,
        simulation.pipeline(system_bundle) as pipeline,
    ):
        subjects = subjects_of(reference, 2)
        for seeds in ([0, 1], [2, 3], [4, 5], [6, 7]):
            assert same(pipeline.generate(subjects, seeds), reference.generate(subjects, seeds))
        assert simulation.cuda.launches == 3
        assert pipeline.engine.name == library
    assert simulation.cuda.live == {"device": 0, "pinned": 0}


def test_a_replay_is_one_launch_and_calls_nothing_else(simulation: Any, tiny: Any) -> None:
    """Nothing per step: no allocation, no address or shape set, no context, and the copies are part of the graph."""
    with simulation.pipeline(tiny.bundle) as pipeline:
        pipeline.generate([1], [0])
        before = (pipeline.engine.allocations, len(simulation.cuda.allocated), simulation.device.contexts)
        pipeline.generate([1], [1])
        assert simulation.cuda.launches == 1
        settled = (simulation.device.shape_changes, simulation.device.address_changes, simulation.cuda.copies)
        pipeline.generate([1], [2])  # a label that was drawn before: its first level is known
        assert simulation.cuda.launches == 2
        assert (simulation.device.shape_changes, simulation.device.address_changes) == settled[:2]
        # One copy in for all that the loop puts, and one out for each of the two arrays that are read.
        assert simulation.cuda.copies - settled[2] == 3
        # Not even the capture allocated anything: it found what the first picture had taken.
        assert (pipeline.engine.allocations, len(simulation.cuda.allocated), simulation.device.contexts) == before


def test_a_second_picture_allocates_nothing_uncaptured(simulation: Any, system_bundle: Path) -> None:
    with simulation.pipeline(system_bundle, PLAIN) as pipeline:
        subjects = subjects_of(pipeline, 2)
        pipeline.generate(subjects, [0, 1])
        before = (len(simulation.cuda.allocated), simulation.device.contexts, simulation.device.shape_changes)
        for seeds in ([2, 3], [4, 5]):
            pipeline.generate(subjects, seeds)
        assert (len(simulation.cuda.allocated), simulation.device.contexts, simulation.device.shape_changes) == before
        assert pipeline.engine.allocations == len(simulation.cuda.allocated)
        assert simulation.cuda.launches == 0


def test_uncaptured_is_the_same(simulation: Any, pipelines: Any, system_bundle: Path) -> None:
    reference, pipeline = pipelines(system_bundle, PLAIN)
    subjects = subjects_of(reference, 3)
    assert same(pipeline.generate(subjects, [4, 5, 6]), reference.generate(subjects, [4, 5, 6]))


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_the_way_there_can_be_saved(simulation: Any, pipelines: Any, system_bundle: Path, cuda_graph: bool) -> None:
    reference, pipeline = pipelines(system_bundle, EngineOptions(cuda_graph=cuda_graph))
    subjects = subjects_of(reference, 2)
    for seeds in ([0, 1], [2, 3]):
        expected = reference.generate(subjects, seeds, save_levels=True)
        made = pipeline.generate(subjects, seeds, save_levels=True)
        assert same(made, expected)
        assert np.array_equal(made.level_latents, expected.level_latents)
        assert np.array_equal(made.level_images, expected.level_images)
    assert simulation.cuda.launches == 0


def test_edits_are_captured_too(simulation: Any, pipelines: Any, system_bundle: Path) -> None:
    reference, pipeline = pipelines(system_bundle)
    size = reference.bundle.manifest.model.image_size
    keep = np.ones((size, size), np.bool_)
    keep[:, size // 2 :] = False
    for seed in range(3):
        image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
        subjects = subjects_of(reference, 2)
        made = pipeline.edit(subjects, [seed, 9], image, keep)
        assert same(made, reference.edit(subjects, [seed, 9], image, keep))
    assert simulation.cuda.launches == 2


def test_an_edit_that_keeps_more_is_recorded_anew(simulation: Any, pipelines: Any, tiny: Any) -> None:
    """MAR draws fewer tokens then: another sequence of calls, of the same batch and settings."""
    reference, pipeline = pipelines(tiny.mar_bundle)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    launches = []
    for columns in (8, 8, 8, 12, 12, 12):
        keep = np.ones((16, 16), np.bool_)
        keep[:, columns:] = False
        assert same(pipeline.edit([1], [5], image, keep), reference.edit([1], [5], image, keep))
        launches.append(simulation.cuda.launches)
    assert launches == [0, 1, 2, 2, 3, 4]


def test_the_rest_of_a_division_is_a_kind_of_its_own(simulation: Any, pipelines: Any, tiny: Any) -> None:
    reference, pipeline = pipelines(tiny.bundle)
    for _ in range(3):
        made = pipeline.generate(range(5), range(5), batch_size=2)
        assert same(made, reference.generate(range(5), range(5), batch_size=2))
    # Batches of two: six, the first of them uncaptured. Of one: three.
    assert simulation.cuda.launches == 5 + 2


def test_generations_with_other_keys_alternate(simulation: Any, pipelines: Any, tiny: Any) -> None:
    reference, pipeline = pipelines(tiny.bundle)
    for seed in range(4):
        for steps in ("2", "3"):
            made = pipeline.generate([seed], [seed], steps=steps)
            assert same(made, reference.generate([seed], [seed], steps=steps))
    assert simulation.cuda.launches == 6


def test_old_graphs_give_their_memory_back(simulation: Any, pipelines: Any, tiny: Any) -> None:
    reference, pipeline = pipelines(tiny.bundle)
    held = []
    for count in (*range(1, 8), 1, 1):
        labels, seeds = range(count), range(count)
        for _ in range(2):
            assert same(pipeline.generate(labels, seeds, batch_size=8), reference.generate(labels, seeds, batch_size=8))
        held.append(simulation.cuda.live["pinned"])
    assert max(held[3:]) - held[3] < BLOCK_BYTES, held  # a captured generation takes at least one block


def test_a_full_device_gives_up_old_graphs(simulate: Any, pipelines: Any, tiny: Any) -> None:
    """A kind takes about 4.1 MiB here, and there is room for two."""
    simulation = simulate(capacity=9 << 20)
    reference, pipeline = pipelines(tiny.bundle, simulation=simulation)
    for _ in range(2):
        for count in (1, 2, 3, 4):
            labels, seeds = range(count), range(count)
            for _ in range(2):
                made = pipeline.generate(labels, seeds, batch_size=8)
                assert same(made, reference.generate(labels, seeds, batch_size=8))


def test_a_picture_made_again_is_the_same(simulation: Any, pipelines: Any, tiny: Any) -> None:
    _, pipeline = pipelines(tiny.bundle)
    made = pipeline.generate([3, 4], [7, 8])
    again = pipeline.like(made.settings[1])
    assert np.array_equal(again.images[0], made.images[1])


def test_an_engine_of_larger_batches_says_so_and_draws_without_the_cache(simulation: Any, tiny: Any) -> None:
    sizes = {"batch": (2, 4, 8)}
    bundle = open_bundle(tiny.bundle, check=False)
    engine = simulation.engine(tiny.bundle, profiles={graph.name: [sizes] for graph in bundle.manifest.graphs})
    assert engine.smallest_batch == 2
    assert simulation.engine(tiny.bundle, profiles={"denoise": [sizes, {}]}).smallest_batch == 1
    drawn = Pipeline(bundle, engine).generate([1, 2], [0, 1]).latents
    plain = Pipeline(bundle, simulation.engine(tiny.bundle), cache_bytes=0).generate([1, 2], [0, 1]).latents
    assert np.array_equal(drawn, plain)
