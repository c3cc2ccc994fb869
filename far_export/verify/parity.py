"""Parity: the sampling loop on the torch reference and on another engine, with the same noise.

Twice: in lockstep, where every stage call is made on both engines with the reference's inputs, so that an error is the
stage's own; and freely, where the engine draws its pictures alone, so that errors add up as they do in use.

A call's error is ||a - b|| / ||b||, with two exceptions: pixels are judged against a mid-grey picture where they are
darker, and the denoise stage against the largest term that it adds up where its output is smaller.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from far_export.compare import compare, psnr
from far_export.stages import SYSTEMS
from far_export.stages.stage import Stage
from far_export.tolerances import free_run_limits, stage_tolerance
from far_export.torch_engine import TorchEngine
from far_export.verify.lockstep import Lockstep
from far_export.verify.results import EngineInfo, LoopResult, PictureResult, Report
from far_runtime.bundle import Bundle, Manifest
from far_runtime.conditioning.subjects import Subject, condition_of
from far_runtime.engines import open_engine
from far_runtime.engines.base import Array, Engine, EngineOptions
from far_runtime.errors import FarError
from far_runtime.sampling.base import Step
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.settings import plan_of, sampler_of

OnProgress = Callable[[int, int], None]
"""Called with the number of units of the loop done and their total, over both runs."""


def verify_bundle(
    bundle: Bundle,
    model: nn.Module,
    vae: nn.Module,
    engine_name: str | None,
    subjects: Sequence[Subject],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    *,
    text: Stage | None = None,
    tolerance_scale: float = 1.0,
    options: EngineOptions | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Draw one picture for every subject, with the seed beside it, on torch and on the engine `engine_name`, under
    resolved sampling settings, and compare. text: the text encoder's stage, for subjects with prompts.

    The report tells whether everything kept its limits; nothing is raised for that. Raises FarError for a model or VAE
    of other sizes than the bundle's and for an engine that is not there.
    """
    check_sizes(bundle.manifest, model, vae)
    candidate = open_engine(bundle, engine_name, options)
    stages = reference_stages(bundle.manifest, model, vae)
    stages += [] if text is None else [text]
    reference, own = TorchEngine(stages), own_tolerances(stages, bundle.manifest)
    try:
        return compare_engines(
            bundle, reference, candidate, subjects, seeds, settings, tolerance_scale, on_progress, own
        )
    finally:
        candidate.close()


def reference_stages(manifest: Manifest, model: nn.Module, vae: nn.Module) -> list[Stage]:
    """The torch stages that run any level, whatever form the bundle has its graphs in."""
    system = SYSTEMS[manifest.system]
    return system.stages(model, vae, manifest.model, None)


def own_tolerances(stages: Sequence[Stage], manifest: Manifest) -> dict[str, float]:
    """The tolerance of every stage as the exporter has it for the precision of the bundle's graphs; the smallest where
    several make up a stage."""
    precisions = {graph.stage: graph.precision for graph in manifest.graphs}
    found: dict[str, float] = {}
    for stage in stages:
        tolerance = stage_tolerance(stage, precisions.get(stage.stage, "fp32"))
        found[stage.stage] = min(tolerance, found.get(stage.stage, math.inf))
    return found


def check_sizes(manifest: Manifest, model: nn.Module, vae: nn.Module) -> None:
    """FarError, naming what differs, unless model and VAE have the sizes and settings that the manifest records."""
    info = json.loads(json.dumps(SYSTEMS[manifest.system].info(model, vae)))
    ours, theirs = _flat(info), _flat(manifest.model)
    different = [
        f"{name} is {ours.get(name)}, the bundle has {value}"
        for name, value in theirs.items()
        if name in ours and ours[name] != value
    ]
    if different:
        raise FarError(
            f"not the checkpoint or VAE that the bundle was exported from: {'; '.join(different)}; "
            "give --checkpoint, --vae and --config as they were at the export"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def compare_engines(
    bundle: Bundle,
    reference: Engine,
    candidate: Engine,
    subjects: Sequence[Subject],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    tolerance_scale: float = 1.0,
    on_progress: OnProgress | None = None,
    tolerances: Mapping[str, float] | None = None,
    inside: bool = True,
) -> Report:
    """The comparison of `verify_bundle` between any two engines that run the bundle's stages. tolerances: by stage, in
    place of the manifest's where they are smaller, so that no bundle loosens its own limits. inside: look at the
    tensors in FP16 graphs, of whose numbers engines on the CPU say nothing."""
    if not subjects or len(subjects) != len(seeds):
        raise FarError(
            f"{len(subjects)} pictures and {len(seeds)} seeds; give one seed for every one, and at least one"
        )
    manifest = bundle.manifest
    sampler, plan = sampler_of(manifest), plan_of(manifest, settings)
    total, done = 2 * sum(step.substeps for step in plan), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    lockstep = Lockstep(manifest, reference, candidate, tolerances or {})
    expected: list[NDArray[Any]] = []

    def keep(step: Step, inner: int, state: Array) -> None:
        if inner == step.substeps:
            expected.append(lockstep.get(state).copy())
            lockstep.enter(step.index + 1)
        advance()

    condition, _ = condition_of(lockstep, bundle, subjects)
    lockstep.enter(0)
    latents = sampler.sample(lockstep, manifest.model, settings, condition, SeedNoise(seeds), keep)
    lockstep.enter(None)
    wanted = lockstep.get(lockstep.run("decode", {"latents": latents})["pixels"])
    stages = lockstep.results(plan, tolerance_scale)
    ranges = lockstep.ranges(bundle) if inside else {}

    worst = max(result.tolerance for result in stages if result.step is not None)
    draws_tokens = SYSTEMS[manifest.system].draws_tokens
    limit, quality = free_run_limits(manifest.precision, draws_tokens, worst, tolerance_scale)
    first_nonfinite: dict[int, int] = {}
    loop: list[LoopResult] = []

    def follow(step: Step, inner: int, state: Array) -> None:
        got = candidate.get(state)
        if not np.isfinite(got).all():
            first_nonfinite.setdefault(step.index, inner - 1)
        if inner == step.substeps:
            found = compare(got, expected[step.index])
            loop.append(
                LoopResult(
                    step.index, step.name, inner, limit, found.error, found.cosine, found.max_abs,
                    found.nonfinite, found.nonfinite_reference, first_nonfinite.get(step.index),
                )
            )  # fmt: skip
        advance()

    condition, _ = condition_of(candidate, bundle, subjects)
    latents = sampler.sample(candidate, manifest.model, settings, condition, SeedNoise(seeds), follow)
    pixels = candidate.get(candidate.run("decode", {"latents": latents})["pixels"])
    return Report(
        bundle=bundle.path.resolve().name,
        bundle_id=manifest.id,
        system=manifest.system,
        precision=manifest.precision,
        created_by=manifest.created_by,
        reference=engine_info(reference),
        candidate=engine_info(candidate),
        settings=dict(settings),
        plan=plan,
        tolerance_scale=tolerance_scale,
        stages=stages,
        ranges=ranges,
        loop=tuple(loop),
        pictures=tuple(
            picture_result(subject, int(seed), got, ours, quality)
            for subject, seed, got, ours in zip(subjects, seeds, pixels, wanted, strict=True)
        ),
    )


def picture_result(
    subject: Subject, seed: int, got: NDArray[np.uint8], wanted: NDArray[np.uint8], limit: float
) -> PictureResult:
    """One picture of the engine against the reference's; [H, W, 3] each."""
    most = int(np.abs(got.astype(np.int16) - wanted).max())
    quality = psnr(got, wanted)
    return PictureResult(subject.label, subject.name, seed, limit, quality, most, reference=wanted, candidate=got)


def engine_info(engine: Engine) -> EngineInfo:
    """Name and version of an engine."""
    return EngineInfo(engine.name, str(getattr(engine, "version", "")))
