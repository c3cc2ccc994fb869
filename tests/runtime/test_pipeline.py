"""Pictures depend on their own label, seed and settings alone, and can be made again bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from far_runtime.cli.option_names import with_options
from far_runtime.engines.base import Engine
from far_runtime.errors import FarError
from far_runtime.generation import Generation, Progress
from far_runtime.pipeline import Pipeline
from far_runtime.sampling import far
from far_runtime.sampling import var as var_loop
from far_runtime.sampling.latent_checks import unsteady
from far_runtime.sampling.lowpass import lowpass
from far_runtime.sampling.settings import batch_key, resolve_plan, resolve_settings
from model_infos import far_info, var_info


def relative_error(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


pictures = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**64 - 1)), min_size=1, max_size=6, unique=True)


@settings(max_examples=8)
@given(pictures, st.integers(1, 6), st.data())
@pytest.mark.parametrize("variant", ["pipeline", "masked_pipeline", "mar_pipeline"])
def test_a_picture_of_a_batch_is_the_picture_alone(
    request: pytest.FixtureRequest, variant: str, wanted: list[tuple[int, int]], batch_size: int, data: st.DataObject
) -> None:
    pipeline: Pipeline = request.getfixturevalue(variant)
    labels, seeds = zip(*wanted, strict=True)
    batch = pipeline.generate(labels, seeds, batch_size=batch_size, steps=2)
    i = data.draw(st.integers(0, len(wanted) - 1))
    alone = pipeline.generate([labels[i]], [seeds[i]], steps=2)
    assert relative_error(batch.latents[i], alone.latents[0]) < 1e-5
    assert batch.latents.shape[1:] == (16, 4)
    assert batch.images.shape == (len(wanted), 16, 16, 3)
    assert batch.images.dtype == np.uint8


def test_seeds_and_labels_make_a_difference(any_pipeline: Pipeline) -> None:
    generation = any_pipeline.generate([1, 1, 2], [0, 1, 0])
    assert relative_error(generation.latents[1], generation.latents[0]) > 0.1
    assert relative_error(generation.latents[2], generation.latents[0]) > 1e-3


@pytest.mark.parametrize("changed", [{"guidance": 1.0}, {"temperature": 0.5}, {"steps": 4}, {"steps": "2:3"}])
def test_settings_make_a_difference(any_pipeline: Pipeline, changed: dict[str, Any]) -> None:
    usual, other = (any_pipeline.generate([1], [0], **options) for options in ({}, changed))
    assert relative_error(other.latents, usual.latents) > 1e-4


def test_noise_is_shared_below_a_level(pipeline: Pipeline) -> None:
    usual = pipeline.generate([1, 2], [0, 1])
    shared = [pipeline.generate([1, 2], [0, 1], shared_noise=level) for level in (0, 1, 3)]
    assert np.array_equal(shared[0].latents, usual.latents)
    assert relative_error(shared[1].latents, usual.latents) > 1e-4
    assert relative_error(shared[2].latents, shared[1].latents) > 1e-4
    alone = pipeline.generate([2], [1], shared_noise=1)
    assert relative_error(alone.latents[0], shared[1].latents[1]) < 1e-5
    assert [one.settings[1].sampling["shared_noise"] for one in shared] == [0, 1, 3]
    again = pipeline.like(shared[1].settings[1])
    assert np.array_equal(again.latents[0], shared[1].latents[1])


def test_models_that_share_noise_draw_all_levels_of_their_grid() -> None:
    for masked in (False, True):
        assert far.resolve_settings(far_info(16, masked), {"shared_noise": 1})["levels"] == list(range(16))
        with pytest.raises(FarError, match="with shared_noise 2 level 1 draws what level 2 sees; put 2 after 1"):
            far.resolve_settings(far_info(16, masked), {"shared_noise": 2, "levels": [0, 1, 3, 5]})
    assert far.resolve_settings(far_info(16), {})["levels"] == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    with pytest.raises(FarError, match=r"shared_noise 1\.5: expected a whole number from 0 to 16"):
        far.resolve_settings(far_info(16), {"shared_noise": 1.5})


def test_presets_keep_what_noise_the_model_shares(pipeline: Pipeline) -> None:
    manifest = pipeline.bundle.manifest
    trained_so = replace(manifest, default_settings={**manifest.default_settings, "shared_noise": 1})
    for name in ("official", "fast"):
        assert resolve_settings(trained_so, {"preset": name})["shared_noise"] == 1
        assert resolve_settings(manifest, {"preset": name})["shared_noise"] == 0
    assert resolve_settings(trained_so, {"shared_noise": 0})["shared_noise"] == 0
    tuned = {"fast": {"settings": {"levels": [0, 1, 3], "steps": 2}, "measured": {"ratio": 1.2}}}
    assert resolve_settings(replace(trained_so, presets=tuned), {"preset": "fast"})["shared_noise"] == 1
    older = replace(
        manifest, default_settings={k: v for k, v in manifest.default_settings.items() if k != "shared_noise"}
    )
    assert resolve_settings(older, {})["shared_noise"] == 0


@pytest.mark.parametrize("scales", [(3.0, 1.5, 3.0), (1.0, 2.0, 1.0)])
def test_pictures_of_a_batch_are_guided_each_by_its_own_scale(
    any_pipeline: Pipeline, scales: tuple[float, ...]
) -> None:
    batch = any_pipeline.generate([1, 2, 3], [4, 5, 6], guidance=scales)
    alone = [
        any_pipeline.generate([label], [seed], guidance=scale)
        for label, seed, scale in zip([1, 2, 3], [4, 5, 6], scales, strict=True)
    ]
    for i, one in enumerate(alone):
        assert relative_error(batch.latents[i], one.latents[0]) < 1e-5
        assert batch.settings[i].sampling == one.settings[0].sampling
    again = any_pipeline.generate([1, 2, 3], [4, 5, 6], guidance=np.array(scales))
    assert again.settings == batch.settings and np.array_equal(again.images, batch.images)
    assert relative_error(any_pipeline.generate([2], [5], guidance=9.0).latents[0], batch.latents[1]) > 1e-4


def test_a_scale_for_each_picture_or_one_for_all(pipeline: Pipeline) -> None:
    with pytest.raises(FarError, match="2 scales of guidance for 3 pictures; give one, or one per picture"):
        pipeline.generate([1, 2, 3], [0, 0, 0], guidance=[1.0, 2.0])
    with pytest.raises(FarError, match=r"guidance -1\.0: expected a number of 0 or more"):
        pipeline.generate([1, 2], [0, 0], guidance=[1.0, -1.0])


def test_pictures_of_one_kind_are_guided_at_the_same_steps(pipeline: Pipeline) -> None:
    manifest = pipeline.bundle.manifest

    def kind(**given: Any) -> str:
        return batch_key(*resolve_plan(manifest, given))

    assert kind(guidance=2.0) == kind(guidance=7.0) != kind(guidance=1.0)
    assert kind(guidance=2.0, guidance_floor=1.6) != kind(guidance=7.0, guidance_floor=1.6)
    assert kind(guidance=2.0) != kind(guidance=2.0, temperature=0.9)


def test_defaults_are_the_manifests(pipeline: Pipeline) -> None:
    usual = pipeline.generate([1], [0])
    explicit = pipeline.generate([1], [0], guidance=3.0, temperature=1.0, steps=3, levels=[0, 1, 2, 3])
    assert np.array_equal(usual.latents, explicit.latents)
    assert usual.settings == explicit.settings
    wanted = {"levels": [0, 1, 2, 3], "steps": 3, "guidance": 3.0, "temperature": 1.0}
    assert usual.settings[0].sampling == wanted | {
        "solver": "ddpm",
        "start": None,
        "guidance_floor": 1.0,
        "shared_noise": 0,
    }


@pytest.mark.parametrize("steps", ["5,2,2,3", [5, 2, 2, 3]])
def test_steps_of_the_bundles_own_levels_are_not_taken_for_others(pipeline: Pipeline, steps: Any) -> None:
    manifest = pipeline.bundle.manifest
    own = replace(manifest, default_settings={**manifest.default_settings, "steps": steps})
    assert resolve_settings(own)["steps"] == [5, 2, 2, 3]
    assert resolve_settings(own, {"levels": [0, 2], "steps": 4})["steps"] == 4
    with pytest.raises(
        FarError, match="levels: the bundle's default has steps 5,2,2,3, for its own levels; give steps beside it"
    ):
        resolve_settings(own, {"levels": [0, 2]})


def test_settings_say_where_each_picture_was_computed(pipeline: Pipeline) -> None:
    generation = pipeline.generate([1, "tabby", 1, 1, 1], [0, 1, 2, 3, 4], batch_size=3)
    assert [(one.batch, one.index) for one in generation.settings] == [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)]
    assert [(one.label, one.name, one.seed) for one in generation.settings[:2]] == [(1, "red fox", 0), (6, "tabby", 1)]
    assert generation.settings[0].bundle == pipeline.bundle.manifest.id
    assert generation.settings[0].engine == "onnxruntime:cpu"


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_like_repeats_every_picture_bit_for_bit(any_pipeline: Pipeline, batch_size: int) -> None:
    labels, seeds = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3]
    generation = any_pipeline.generate(labels, seeds, batch_size=batch_size, steps="2:4", guidance=2.5, temperature=0.9)
    for i, recorded in enumerate(generation.settings):
        again = any_pipeline.like(recorded)
        assert np.array_equal(again.images[0], generation.images[i])
        assert np.array_equal(again.latents[0], generation.latents[i])
        assert again.settings == (recorded,)


class RowsRoundDifferently:
    """An engine whose results depend on the size of the batch and on the row, far more than rounding does."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name = engine, "uneven"
        self.put, self.get, self.close = engine.put, engine.get, engine.close

    def run(self, stage: str, inputs: Any, constants: Any = None) -> dict[str, Any]:
        outputs = self.engine.run(stage, inputs, constants)
        if stage == "denoise":
            state = self.get(outputs["next_state"])
            rows = np.arange(1, len(state) + 1, dtype=np.float32)[:, None, None]
            outputs["next_state"] = self.put(state + rows * np.float32(0.01 * len(state)))
        return outputs


def test_like_computes_the_picture_in_its_old_place_of_a_batch(any_pipeline: Pipeline) -> None:
    uneven = Pipeline(any_pipeline.bundle, RowsRoundDifferently(any_pipeline.engine))
    generation = uneven.generate([3, 1, 4, 1, 5], [9, 2, 6, 5, 3], batch_size=3)
    for i, recorded in enumerate(generation.settings):
        assert np.array_equal(uneven.like(recorded).images[0], generation.images[i])
        assert not np.array_equal(uneven.generate([recorded.label], [recorded.seed]).images[0], generation.images[i])


def test_level_pictures_are_the_low_passed_samples(far_pipeline: Pipeline) -> None:
    generation = far_pipeline.generate([1, 2, 3], [0, 0, 0], batch_size=2, save_levels=True)
    levels = generation.settings[0].sampling["levels"]
    assert generation.step_names == tuple(f"level {level}" for level in levels)
    assert generation.level_latents is not None and generation.level_images is not None
    assert generation.level_latents.shape == (3, len(levels), 16, 4)
    assert np.array_equal(generation.level_latents[:, -1], generation.latents)
    assert np.array_equal(generation.level_images[:, -1], generation.images)
    for i, following in enumerate(levels[1:]):
        seen = far_pipeline.decode(lowpass(generation.level_latents[:2, i], following))
        assert np.array_equal(generation.level_images[:2, i], seen)


def test_iteration_pictures_fill_up_with_tokens(mar_pipeline: Pipeline) -> None:
    generation = mar_pipeline.generate([1, 2, 3], [0, 5, 0], batch_size=2, save_levels=True)
    assert generation.level_latents is not None and generation.level_images is not None
    assert generation.step_names == ("iteration 1", "iteration 2", "iteration 3", "iteration 4")
    drawn = (generation.level_latents != 0).all(axis=-1)
    assert drawn.sum(axis=-1).tolist() == [[2, 5, 10, 16]] * 3
    for before, after in pairwise(range(4)):  # what has been drawn stays as it is
        here, there = generation.level_latents[:, before], generation.level_latents[:, after]
        assert np.array_equal(here[drawn[:, before]], there[drawn[:, before]])
        assert (here[~drawn[:, before]] == 0).all()
    assert np.array_equal(generation.level_latents[:, -1], generation.latents)
    assert np.array_equal(generation.level_images[:, -1], generation.images)
    assert np.array_equal(generation.level_images[:2, 1], mar_pipeline.decode(generation.level_latents[:2, 1]))


def test_level_pictures_change_nothing(any_pipeline: Pipeline) -> None:
    plain = any_pipeline.generate([1, 2], [0, 0])
    kept = any_pipeline.generate([1, 2], [0, 0], save_levels=True)
    assert np.array_equal(plain.images, kept.images)
    assert plain.level_images is None and plain.level_latents is None


def test_progress_counts_every_diffusion_step_once(pipeline: Pipeline) -> None:
    seen: list[Progress] = []
    pipeline.generate([1, 2, 3], [0, 0, 0], steps="2:5", batch_size=2, on_progress=seen.append)
    assert [at.done for at in seen] == list(range(1, 29))
    assert {(at.total, at.batches, at.steps) for at in seen} == {(28, 2, 4)}
    assert [at.batch for at in seen] == [0] * 14 + [1] * 14
    assert [(at.step.number, at.inner) for at in seen[:5]] == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]


def test_a_slice_of_a_generation_keeps_what_belongs_together(pipeline: Pipeline) -> None:
    generation = pipeline.generate([1, 2], [5, 6], save_levels=True)
    second: Generation = generation[1:]
    assert second.settings[0].seed == 6
    assert second.level_images is not None and np.array_equal(second.level_images[0, -1], generation.images[1])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"subjects": []}, "no labels"),
        ({"seeds": [1, 2]}, "2 seeds for 1 labels"),
        ({"seeds": [-1]}, "seed -1"),
        ({"batch_size": 0}, "batch size 0"),
        ({"subjects": [10]}, "label 10: out of range"),
        ({"guidance": -1.0}, "guidance -1"),
        ({"levels": [2, 1]}, "levels must rise"),
        ({"levels": [4]}, "level 4 is outside 0 to 3"),
        ({"steps": "x"}, "steps x"),
        ({"guidance": "much"}, "guidance much: expected a number of 0 or more; use guidance 3, say"),
        ({"solver": 3}, "not iterable; give numbers"),
        ({"iterations": 3, "top_k": 1}, "iterations, top_k: a far model has no such setting; it takes levels, "),
        ({"negative": "fog"}, "draws from class labels, not from text; use label in place of negative"),
    ],
)
def test_bad_numbers_are_refused(pipeline: Pipeline, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(FarError, match=reason):
        pipeline.generate(**{"subjects": [1], "seeds": [0], **arguments})


def test_levels_without_a_graph_are_refused_before_any_work(masked_pipeline: Pipeline) -> None:
    seen: list[Progress] = []
    with pytest.raises(FarError, match=r"no transformer graph for level 1.*--levels shared"):
        masked_pipeline.generate([1], [0], levels=[0, 1], on_progress=seen.append)
    assert seen == []


def test_threads_are_checked(tiny: Any) -> None:
    with pytest.raises(FarError, match="0 threads"):
        Pipeline.from_bundle(tiny.bundle, threads=0)


def test_an_unknown_system_is_refused(pipeline: Pipeline) -> None:
    bundle = replace(pipeline.bundle, manifest=replace(pipeline.bundle.manifest, system="var2"), path=Path("new"))
    with pytest.raises(FarError, match=r"new: system 'var2'; .*pip install -U far-deploy"):
        Pipeline(bundle, pipeline.engine)


def test_close_gives_the_sessions_back(tiny: Any) -> None:
    with Pipeline.from_bundle(tiny.bundle, "onnxruntime", threads=1) as opened:
        opened.generate([1], [0], steps=1)
        assert opened.engine._sessions  # type: ignore[attr-defined]
    assert not opened.engine._sessions  # type: ignore[attr-defined]


class Broken:
    """An engine whose latents come out as NaN."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.name = engine, engine.name
        self.put, self.run, self.close = engine.put, engine.run, engine.close

    def get(self, array: Any) -> Any:
        host = self.engine.get(array)
        return np.full_like(host, np.nan) if host.dtype == np.float32 else host


def test_latents_that_are_not_finite_make_no_picture(pipeline: Pipeline) -> None:
    with pytest.raises(FarError, match=r"not finite with levels \[0, 1, 2, 3\], .*guidance 3\.0"):
        Pipeline(pipeline.bundle, Broken(pipeline.engine)).generate([1], [0])


def test_latents_that_are_far_too_large_give_a_warning(pipeline: Pipeline) -> None:
    plan = resolve_plan(pipeline.bundle.manifest)[1]
    latents = np.random.default_rng(0).standard_normal((2, 16, 4), np.float32)
    assert unsteady(plan, 2 * latents) == ()
    (warning,) = unsteady(plan, 565 * latents)
    deviation = float(latents.std()) * 565
    assert f"is {deviation:.0f} where about 1 is right" in warning and "start 950" in warning
    assert "try --start 950, a --preset other" in with_options(warning)
    var = var_loop.plan(var_info(), var_loop.resolve_settings(var_info(), {}))
    assert unsteady(var, 565 * latents) == ()  # feature maps have no such scale


def test_untuned_presets_of_mar_leave_the_first_iterations_unguided(mar_pipeline: Pipeline) -> None:
    manifest = mar_pipeline.bundle.manifest
    unguided = {}
    for name in ("official", "quality", "balanced", "fast"):
        steps = resolve_plan(manifest, {"preset": name, "iterations": 16, "guidance": 2.9})[1]
        halves = [call.rows for step in steps for call in step.calls if call.stage == "transformer"]
        assert halves == sorted(halves), "guidance rises, so only the first may be unguided"
        unguided[name] = halves.count(1)
    assert unguided["official"] <= unguided["quality"] < unguided["balanced"] == unguided["fast"] < 8
