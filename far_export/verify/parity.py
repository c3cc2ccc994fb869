"""Parity: the sampling loop on the torch reference and on another engine, with the same noise.

The loop runs twice. In lockstep every stage call gets the reference's inputs on both engines, so that an error belongs
to the stage itself. In the free run the candidate engine draws alone, so that errors add up as they do in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from far_export.compare import compare, psnr
from far_export.stages import SYSTEMS
from far_export.stages.stage import Stage
from far_export.tolerances import free_run_limits
from far_export.torch_engine import TorchEngine
from far_export.verify.lockstep import Lockstep
from far_export.verify.reference import check_sizes, exporter_tolerances, reference_stages
from far_export.verify.results import EngineInfo, LoopResult, PictureResult, Report
from far_runtime.bundle import Bundle
from far_runtime.conditioning.subjects import Subject, condition_of
from far_runtime.engines import open_engine
from far_runtime.engines.base import Array, Engine, EngineOptions
from far_runtime.engines.select import Choice
from far_runtime.errors import FarError
from far_runtime.sampling.base import Plan, Step
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.settings import plan_of, sampler_of

OnProgress = Callable[[int, int], None]
"""Called with the number of diffusion steps done and their total, over both runs of the loop."""


@dataclass(frozen=True)
class SampleInputs:
    """What both engines draw: one picture for every subject, with the seed beside it."""

    subjects: Sequence[Subject]
    seeds: Sequence[int]
    settings: Mapping[str, Any]
    """Resolved sampling settings by name."""

    def __post_init__(self) -> None:
        if not self.subjects or len(self.subjects) != len(self.seeds):
            raise FarError(
                f"{len(self.subjects)} pictures and {len(self.seeds)} seeds; give one seed for every picture, and at "
                "least one"
            )


@dataclass(frozen=True)
class VerifyOptions:
    """How strictly two engines are compared, and who hears of the progress."""

    tolerance_scale: float = 1.0
    """Multiplies all tolerances."""
    tolerances: Mapping[str, float] = field(default_factory=dict)
    """Tolerances by stage, in place of the manifest's where they are smaller, so that no bundle loosens its limits."""
    check_ranges: bool = True
    """Whether to compute the tensors inside of FP16 graphs and check them against the range of FP16."""
    on_progress: OnProgress | None = None


DEFAULT_OPTIONS = VerifyOptions()


def verify_bundle(
    bundle: Bundle,
    model: nn.Module,
    vae: nn.Module,
    engine: str | Choice | None,
    inputs: SampleInputs,
    *,
    text: Stage | None = None,
    engine_options: EngineOptions | None = None,
    options: VerifyOptions = DEFAULT_OPTIONS,
) -> Report:
    """Draw the same pictures on torch and on an engine, and compare every stage at every step.

    text: the text encoder's stage, for subjects with prompts.
    options.tolerances: the exporter's are used where none are given.

    What is beyond its limit is in the report. Raises FarError for a model or VAE of other sizes than the bundle's and
    for an engine that is not there.
    """
    check_sizes(bundle.manifest, model, vae)
    candidate = open_engine(bundle, engine, engine_options)
    stages = reference_stages(bundle.manifest, model, vae, text)
    if not options.tolerances:
        options = replace(options, tolerances=exporter_tolerances(stages, bundle.manifest))
    try:
        return compare_engines(bundle, TorchEngine(stages), candidate, inputs, options)
    finally:
        candidate.close()


def compare_engines(
    bundle: Bundle,
    reference: Engine,
    candidate: Engine,
    inputs: SampleInputs,
    options: VerifyOptions = DEFAULT_OPTIONS,
) -> Report:
    """The comparison of `verify_bundle` between any two engines that run the bundle's stages."""
    manifest = bundle.manifest
    plan = plan_of(manifest, inputs.settings)
    advance = _progress_counter(2 * sum(step.substeps for step in plan), options.on_progress)
    lockstep = Lockstep(manifest, reference, candidate, options.tolerances)
    expected = _run_loop(lockstep, bundle, inputs, plan, advance, lockstep.enter)
    stages = lockstep.results(plan, options.tolerance_scale)
    ranges = lockstep.ranges(bundle) if options.check_ranges else {}
    actual = _run_loop(candidate, bundle, inputs, plan, advance)
    loop_limit, psnr_limit = free_run_limits(
        manifest.precision,
        draws_tokens=SYSTEMS[manifest.system].draws_tokens,
        tolerance=max(result.tolerance for result in stages if result.step is not None),
        scale=options.tolerance_scale,
    )
    pictures = zip(inputs.subjects, inputs.seeds, actual.pixels, expected.pixels, strict=True)
    return Report(
        bundle=bundle.path.resolve().name,
        bundle_id=manifest.id,
        system=manifest.system,
        precision=manifest.precision,
        created_by=manifest.created_by,
        reference=_engine_info(reference),
        candidate=_engine_info(candidate),
        settings=dict(inputs.settings),
        plan=plan,
        tolerance_scale=options.tolerance_scale,
        stages=stages,
        ranges=ranges,
        loop=tuple(_loop_result(step, actual, expected, loop_limit) for step in plan),
        pictures=tuple(_picture_result(*picture, psnr_limit) for picture in pictures),
    )


@dataclass(frozen=True)
class LoopRun:
    """What one run of the loop computed, on the host."""

    states: list[NDArray[Any]]
    """The latents after every step."""
    first_nonfinite: list[int | None]
    """By step: the first diffusion step after which the state had a NaN or infinite value."""
    pixels: NDArray[np.uint8]
    """The pictures [B, H, W, 3]."""


def _run_loop(
    engine: Engine,
    bundle: Bundle,
    inputs: SampleInputs,
    plan: Plan,
    advance: Callable[[], None],
    enter: Callable[[int | None], None] = lambda step: None,
) -> LoopRun:
    """Draw on one engine. advance: called after every diffusion step. enter: called with the index of the step that the
    loop enters, and with None where it ends."""
    states: list[NDArray[Any]] = []
    first_nonfinite: list[int | None] = []
    nonfinite_substeps: list[int] = []

    def on_step(step: Step, done: int, state: Array) -> None:
        array = engine.get(state)
        if not np.isfinite(array).all():
            nonfinite_substeps.append(done - 1)
        if done == step.substeps:
            states.append(array.copy())
            first_nonfinite.append(nonfinite_substeps[0] if nonfinite_substeps else None)
            nonfinite_substeps.clear()
            enter(step.index + 1)
        advance()

    manifest, noise = bundle.manifest, SeedNoise(inputs.seeds)
    condition, _ = condition_of(engine, bundle, inputs.subjects)
    enter(0)
    latents = sampler_of(manifest).sample(engine, manifest.model, plan, condition, noise, on_step)
    enter(None)
    pixels = engine.get(engine.run("decode", {"latents": latents})["pixels"])
    return LoopRun(states, first_nonfinite, pixels)


def _progress_counter(total: int, on_progress: OnProgress | None) -> Callable[[], None]:
    """A function that counts its calls and reports them."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    return advance


def _loop_result(step: Step, actual: LoopRun, expected: LoopRun, limit: float) -> LoopResult:
    comparison = compare(actual.states[step.index], expected.states[step.index])
    return LoopResult(
        step=step.index,
        step_name=step.name,
        substeps=step.substeps,
        limit=limit,
        error=comparison.error,
        cosine=comparison.cosine,
        max_abs=comparison.max_abs,
        nonfinite=comparison.nonfinite,
        nonfinite_reference=comparison.nonfinite_reference,
        first_nonfinite=actual.first_nonfinite[step.index],
    )


def _picture_result(
    subject: Subject, seed: int, actual: NDArray[np.uint8], expected: NDArray[np.uint8], limit: float
) -> PictureResult:
    """One picture [H, W, 3] of the candidate against the reference's."""
    return PictureResult(
        label=subject.label,
        name=subject.name,
        seed=int(seed),
        limit=limit,
        psnr=psnr(actual, expected),
        max_difference=int(np.abs(actual.astype(np.int16) - expected).max()),
        reference=expected,
        candidate=actual,
    )


def _engine_info(engine: Engine) -> EngineInfo:
    return EngineInfo(engine.name, str(getattr(engine, "version", "")))
