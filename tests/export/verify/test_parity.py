"""Parity: an honest bundle passes, and what is wrong is found where it is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from far_export.load import load_pair
from far_export.stages import SYSTEMS
from far_export.tolerances import required_psnr
from far_export.torch_engine import TorchEngine
from far_export.verify import parity
from far_export.verify.lockstep import Lockstep
from far_export.verify.parity import SampleInputs, VerifyOptions, compare_engines, verify_bundle
from far_export.verify.reference import exporter_tolerances, reference_stages
from far_export.verify.results import Report
from far_runtime.bundle import Bundle, open_bundle
from far_runtime.conditioning.subjects import resolve_subjects
from far_runtime.engines import open_engine
from far_runtime.engines.base import Array, Engine, EngineOptions
from far_runtime.errors import FarError
from far_runtime.sampling.settings import resolve_settings
from far_runtime.sampling.solvers import COEFFICIENTS

if TYPE_CHECKING:
    from conftest import Tiny

LABELS, SEEDS = (1, 4), (0, 7)
Change = Callable[[nn.Module, nn.Module], None]


@pytest.fixture(params=["unmasked", "masked", "mar"])
def case(request: pytest.FixtureRequest, tiny: Tiny) -> tuple[Bundle, Path]:
    """A bundle and its checkpoint; shared levels unmasked, one graph per level masked; and MAR."""
    if request.param == "masked":
        return open_bundle(tiny.masked_bundle), tiny.masked
    if request.param == "mar":
        return open_bundle(tiny.mar_bundle), tiny.mar
    return open_bundle(tiny.bundle), tiny.safetensors


def inputs(bundle: Bundle, **settings: Any) -> SampleInputs:
    return SampleInputs(resolve_subjects(bundle.manifest, LABELS), SEEDS, resolve_settings(bundle.manifest, settings))


def run(bundle: Bundle, checkpoint: Path, vae: Path, change: Change | None = None, **settings: Any) -> Report:
    model, decoder = (loaded.model for loaded in load_pair(checkpoint, vae))
    if change is not None:
        change(model, decoder)
    return verify_bundle(
        bundle, model, decoder, "onnxruntime", inputs(bundle, **settings), engine_options=EngineOptions(threads=1)
    )


def test_an_honest_bundle_passes(case: tuple[Bundle, Path], tiny: Tiny) -> None:
    bundle, checkpoint = case
    report = run(bundle, checkpoint, tiny.vae)
    steps = len(report.plan)
    assert report.passed and report.failures == ()
    mar = report.system == "mar"
    of_step = (("transformer", 1), ("denoise", 3), *((("place", 1),) if mar else ()))
    assert [(r.stage, r.step, r.calls) for r in report.stages] == [
        *((stage, i, calls) for i in range(steps) for stage, calls in of_step),
        ("decode", None, 1),
    ]
    assert all(r.error == 0 for r in report.stages if r.stage == "place")  # a copy
    assert all(0 <= result.error < 1e-5 for result in report.stages[:-1])
    assert any(
        result.error > 0 for result in report.stages
    )  # two libraries: equal to the last bit would be no comparison
    names = [f"iteration {i}" for i in (1, 2, 3, 4)] if mar else [f"level {i}" for i in report.settings["levels"]]
    assert [result.step_name for result in report.loop] == names == [step.name for step in report.plan]
    assert report.latents_limit == pytest.approx(1e-3)
    assert report.pictures[0].limit == 40
    assert [(picture.label, picture.seed) for picture in report.pictures] == list(zip(LABELS, SEEDS, strict=True))
    assert report.candidate.name == "onnxruntime:cpu" and report.candidate.version
    assert report.reference.version == torch.__version__
    if checkpoint == tiny.masked:
        assert len({result.graph for result in report.stages if result.stage == "transformer"}) == steps


def test_the_pictures_are_those_that_the_pipeline_draws(tiny: Tiny) -> None:
    from far_runtime.pipeline import Pipeline

    report = run(open_bundle(tiny.bundle), tiny.safetensors, tiny.vae)
    with Pipeline.from_bundle(tiny.bundle, options=EngineOptions(threads=1)) as pipeline:
        drawn = pipeline.generate(LABELS, SEEDS).images
    np.testing.assert_array_equal(np.stack([picture.candidate for picture in report.pictures]), drawn)


def scaled(name: str, factor: float = 1.02, of_vae: bool = False) -> Change:
    def change(model: nn.Module, vae: nn.Module) -> None:
        with torch.no_grad():
            (vae if of_vae else model).get_parameter(name).mul_(factor)

    return change


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        (scaled("encoder_blocks.0.attn.qkv.weight"), "transformer"),
        (scaled("diffloss.net.cond_embed.bias", -1.0), "transformer"),
        (scaled("diffloss.net.res_blocks.1.mlp.0.weight"), "denoise"),
        (scaled("decoder.conv_out.weight", 1.2, of_vae=True), "decode"),
    ],
)
def test_a_changed_weight_fails_the_stage_that_holds_it(
    case: tuple[Bundle, Path], tiny: Tiny, change: Change, stage: str
) -> None:
    bundle, checkpoint = case
    report = run(bundle, checkpoint, tiny.vae, change)
    assert not report.passed
    assert report.failures[0].startswith(stage)
    # In lockstep the other stages get the reference's inputs, so they are not blamed.
    assert {result.stage for result in report.stages if not result.passed} == {stage}


def test_the_first_failing_level_is_named(tiny: Tiny) -> None:
    bundle = open_bundle(tiny.bundle)
    report = compare_with(bundle, tiny, lambda stage, step, call: 1.01 if (stage, step) == ("denoise", 2) else 1)
    assert [(r.stage, r.step) for r in report.stages if not r.passed] == [("denoise", 2)]
    sentence = report.failures[0]
    assert re.fullmatch(
        r"denoise at level 2 \(step 3 of 4\): relative error 1\.00e-02 at diffusion step [123] of 3, tolerance 1e-04",
        sentence,
    )
    assert [result.passed for result in report.loop[:2]] == [True, True] and not report.loop[2].passed


def test_one_bad_diffusion_step_is_not_averaged_away(tiny: Tiny) -> None:
    """Off by 3e-4 in one call of three: the mean over the level is within the tolerance, the call is not."""
    bundle = open_bundle(tiny.bundle)

    def factor(stage: str, step: int, call: int) -> float:
        return 1 + 3e-4 if (stage, step, call) == ("denoise", 1, 2) else 1

    report = compare_with(bundle, tiny, factor)
    bad = [result for result in report.stages if not result.passed]
    assert [(r.stage, r.step, r.worst_call) for r in bad] == [("denoise", 1, 2)]
    assert bad[0].error == pytest.approx(3e-4, rel=0.01)
    assert "at diffusion step 3 of 3" in report.failures[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("stage", "step", "call"), [("transformer", 1, 0), ("denoise", 2, 1)])
def test_the_first_nan_is_named(tiny: Tiny, stage: str, step: int, call: int, value: float) -> None:
    bundle = open_bundle(tiny.bundle)
    report = compare_with(bundle, tiny, lambda *where: value if where == (stage, step, call) else 1)
    assert not report.passed
    bad = [result for result in report.stages if result.nonfinite]
    assert [(r.stage, r.step, r.first_nonfinite) for r in bad] == [(stage, step, call)]
    assert bad[0].nonfinite == 1 and bad[0].nonfinite_reference == 0 and bad[0].error == math.inf
    assert report.failures[0].startswith(f"{stage} at level {step} (step {step + 1} of 4)")
    assert "NaN or Inf" in report.failures[0]
    assert report.failures[0].endswith(
        "1 values of onnxruntime:cpu first at diffusion step 2 of 3"
        if stage == "denoise"
        else "1 values of onnxruntime:cpu"
    )
    # Drawn freely, it spreads from there on.
    assert [result.first_nonfinite for result in report.loop[: step + 1]] == [None] * step + [call]
    assert not any(result.passed for result in report.loop[step:])
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_reference_that_is_not_finite_is_not_excused(tiny: Tiny) -> None:
    bundle = open_bundle(tiny.bundle)
    report = run(bundle, tiny.safetensors, tiny.vae, scaled("diffloss.net.input_proj.bias", math.nan))
    first = next(result for result in report.stages if not result.passed)
    assert (first.stage, first.step) == ("denoise", 0)
    # From the second call on the engine is handed the reference's NaN, and can only pass them on.
    assert (first.first_nonfinite_reference, first.first_nonfinite) == (0, 1)
    assert first.nonfinite_reference == 3 * 2 * 16 * 4
    assert "torch:cpu first at diffusion step 1 of 3; " in report.failures[0]


def test_tolerances_can_be_scaled(tiny: Tiny) -> None:
    bundle = open_bundle(tiny.bundle)
    model, vae = (loaded.model for loaded in load_pair(tiny.safetensors, tiny.vae))
    for scale, passed in ((1.0, True), (1e-5, False)):
        report = verify_bundle(
            bundle, model, vae, "onnxruntime", inputs(bundle), engine_options=EngineOptions(threads=1),
            options=VerifyOptions(tolerance_scale=scale),
        )  # fmt: skip
        assert report.passed is passed
        assert {r.tolerance for r in report.stages} == {1e-4 * scale, 2e-3 * scale}
        assert report.latents_limit == pytest.approx(1e-3 * scale)


def test_a_bundle_does_not_loosen_its_own_tolerances(tiny: Tiny) -> None:
    """A manifest may ask for more than the exporter does, not for less."""
    bundle = open_bundle(tiny.bundle)
    for factor, limits in ((1000.0, {1e-4, 2e-3}), (0.5, {5e-5, 1e-3})):
        graphs = tuple(replace(graph, tolerance=factor * graph.tolerance) for graph in bundle.manifest.graphs)
        claimed = Bundle(bundle.path, replace(bundle.manifest, graphs=graphs))
        change = scaled("encoder_blocks.0.attn.qkv.weight")
        assert run(claimed, tiny.safetensors, tiny.vae).passed
        report = run(claimed, tiny.safetensors, tiny.vae, change)
        assert {result.stage for result in report.stages if not result.passed} == {"transformer"}
        assert {result.tolerance for result in report.stages} == limits
        assert report.latents_limit == pytest.approx(10 * min(limits))


def test_fewer_steps_and_levels_and_no_guidance(tiny: Tiny) -> None:
    report = run(open_bundle(tiny.bundle), tiny.safetensors, tiny.vae, steps="1:2", levels=[0, 3], guidance=1.0)
    assert report.passed
    assert [(r.stage, r.step_name, r.calls) for r in report.stages[:-1]] == [
        ("transformer", "level 0", 1), ("denoise", "level 0", 1),
        ("transformer", "level 3", 1), ("denoise", "level 3", 2),
    ]  # fmt: skip


def test_other_sizes_are_named(tiny: Tiny) -> None:
    from far_models.far import FAR

    bundle = open_bundle(tiny.bundle)
    model, vae = (loaded.model for loaded in load_pair(tiny.safetensors, tiny.vae))
    other = FAR(replace(model.config, encoder_depth=2, head_width=48))
    with pytest.raises(FarError) as caught:
        verify_bundle(bundle, other, vae, "onnxruntime", inputs(bundle))
    text = str(caught.value)
    assert "encoder_depth is 2, the bundle has 1" in text and "head_width is 48, the bundle has 32" in text
    assert "decoder_depth" not in text


def test_progress_ends_at_its_total(tiny: Tiny) -> None:
    bundle = open_bundle(tiny.bundle)
    seen: list[tuple[int, int]] = []
    compare_with(bundle, tiny, options=VerifyOptions(on_progress=lambda done, total: seen.append((done, total))))
    assert seen == [(i, 24) for i in range(1, 25)]


def test_every_picture_needs_a_seed(tiny: Tiny) -> None:
    subjects = inputs(open_bundle(tiny.bundle)).subjects
    for some, seeds in ((subjects, [0]), ([], []), (subjects[:1], [0, 1])):
        with pytest.raises(FarError, match=f"{len(some)} pictures and {len(seeds)} seeds"):
            SampleInputs(some, seeds, {})


def test_the_engine_is_closed_also_after_an_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Broken(Sum):
        def close(self) -> None:
            closed.append(self.name)

    monkeypatch.setattr(parity, "open_engine", lambda *_: Broken(0.0))
    with pytest.raises(KeyError):  # it has no stage but the denoise stage
        run(open_bundle(tiny.bundle), tiny.safetensors, tiny.vae)
    assert closed == ["sum of 0"]


def as_precision(bundle: Bundle, precision: str) -> Bundle:
    """The same FP32 graphs under a manifest that claims another precision."""
    graphs = tuple(replace(graph, precision=precision) for graph in bundle.manifest.graphs)
    return Bundle(bundle.path, replace(bundle.manifest, precision=precision, graphs=graphs))


def test_the_free_run_of_fp16_has_limits_of_its_own_where_no_tokens_are_drawn(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = as_precision(open_bundle(tiny.bundle), "fp16")
    report = compare_with(bundle, tiny, options=VerifyOptions(tolerance_scale=2.0))
    assert report.latents_limit == pytest.approx(0.2)
    assert report.psnr_limit == pytest.approx(35 - 20 * math.log10(2))
    system = replace(SYSTEMS["far"], draws_tokens=True)
    monkeypatch.setattr(parity, "SYSTEMS", {**SYSTEMS, "far": system})
    report = compare_with(bundle, tiny)
    assert (report.latents_limit, report.psnr_limit) == (math.inf, -math.inf)


def test_tolerances_follow_the_precision_of_the_graphs(tiny: Tiny) -> None:
    bundle = open_bundle(tiny.bundle)
    stages = reference_stages(bundle.manifest, *(loaded.model for loaded in load_pair(tiny.safetensors, tiny.vae)))
    assert exporter_tolerances(stages, bundle.manifest) == {"transformer": 1e-4, "denoise": 1e-4, "decode": 2e-3}
    fp16 = exporter_tolerances(stages, as_precision(bundle, "fp16").manifest)
    assert fp16 == dict.fromkeys(("transformer", "denoise", "decode"), 1e-2)
    strict, loose = (replace(stages[0], tolerance=tolerance) for tolerance in (1e-5, 1e-3))
    for order in ([strict, loose], [loose, strict]):
        assert exporter_tolerances(order, bundle.manifest) == {"transformer": 1e-5}


def test_tensors_inside_of_fp16_graphs_are_checked_at_every_step(tiny: Tiny) -> None:
    bundle = as_precision(open_bundle(tiny.bundle), "fp16")
    ranges = compare_with(bundle, tiny).ranges
    assert {name: tensors.calls for name, tensors in ranges.items()} == {"transformer": 4, "denoise": 4, "decode": 1}
    assert compare_with(bundle, tiny, options=VerifyOptions(check_ranges=False)).ranges == {}
    assert compare_with(open_bundle(tiny.bundle), tiny).ranges == {}


def test_the_first_nan_of_several_is_named(tiny: Tiny) -> None:
    bundle = open_bundle(tiny.bundle)
    report = compare_with(
        bundle, tiny, lambda *where: math.nan if where in (("denoise", 1, 1), ("denoise", 1, 2)) else 1
    )
    (bad,) = [result for result in report.stages if result.nonfinite]
    assert (bad.step, bad.nonfinite, bad.first_nonfinite) == (1, 2, 1)
    # In the free run the later levels are NaN from their first diffusion step on.
    assert [result.first_nonfinite for result in report.loop] == [None, 1, 0, 0]
    assert report.ranges["denoise"].calls == 1  # the call whose inputs were finite still


def test_psnr_that_is_required() -> None:
    assert required_psnr(1e-3) == 40
    assert required_psnr(1e-5) == 40
    assert required_psnr(5e-3) == pytest.approx(26.02, abs=0.01)
    assert required_psnr(0.1) == 25


class Sum:
    """An engine whose denoise stage returns state + output, with an error of `off` in the output."""

    def __init__(self, off: float) -> None:
        self.name, self.off = f"sum of {off:g}", off

    def put(self, array: np.ndarray) -> Array:
        return array

    get = put

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        state = inputs["coefficients"].max() * inputs["state"] - inputs["noise"] * (1 + self.off)
        return {"next_state": state, "next_history": state}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("large", ["state", "x0_state"])
@pytest.mark.parametrize(("off", "passed"), [(5e-5, True), (5e-4, False)])
def test_the_first_update_is_measured_against_its_terms(tiny: Tiny, off: float, passed: bool, large: str) -> None:
    """Terms of 300 that leave 1: a term off by 5e-5 leaves an error of 1.5e-2, and neither engine could do better."""
    ones = np.ones((2, 16, 4), np.float32)
    lockstep = Lockstep(open_bundle(tiny.bundle).manifest, Sum(0.0), Sum(off))
    inputs = {
        "state": ones,
        "history": ones,
        "coefficients": np.array([{large: 300, "x0_output": 1}.get(name, 0) for name in COEFFICIENTS], np.float32),
        "noise": 299 * ones,
    }
    lockstep.run("denoise", {name: lockstep.put(array) for name, array in inputs.items()})
    result, history = lockstep.results(())
    assert (result.output, history.output, history.passed) == ("next_state", "next_history", passed)
    assert result.passed is passed
    assert result.error == pytest.approx(off, rel=0.01)
    assert result.relative_error == pytest.approx(off * 299, rel=0.01)


class Spoiled:
    """An engine whose stages' outputs are multiplied by a factor of stage, step and call; NaN and Inf go into one
    entry."""

    def __init__(self, engine: Engine, factor: Callable[[str, int, int], float]) -> None:
        self.engine, self.factor, self.name = engine, factor, engine.name
        self.step, self.call = -1, 0
        self.put, self.get, self.close = engine.put, engine.get, engine.close

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        if stage == "transformer":
            # The loop runs twice: a level list that starts again is the second run.
            self.step = 0 if constants is not None and constants["level"] == 0 else self.step + 1
            self.call = 0
        outputs = self.engine.run(stage, inputs, constants)
        factor = self.factor(stage, self.step, self.call)
        if stage == "denoise":
            self.call += 1
        if factor == 1:
            return outputs
        return {name: self.engine.put(spoil(self.engine.get(array), factor)) for name, array in outputs.items()}


def spoil(array: np.ndarray, factor: float) -> np.ndarray:
    if math.isfinite(factor):
        return (array * factor).astype(array.dtype)
    array = array.copy()
    array.flat[3] = factor
    return array


def compare_with(
    bundle: Bundle,
    tiny: Tiny,
    factor: Callable[[str, int, int], float] = lambda *where: 1.0,
    options: VerifyOptions = VerifyOptions(),  # noqa: B008
) -> Report:
    """The checkpoint against an engine that is spoiled in one place."""
    model, vae = (loaded.model for loaded in load_pair(tiny.safetensors, tiny.vae))
    reference = TorchEngine(reference_stages(bundle.manifest, model, vae))
    candidate = Spoiled(open_engine(bundle, "onnxruntime", EngineOptions(threads=1)), factor)
    return compare_engines(bundle, reference, candidate, inputs(bundle), options)
