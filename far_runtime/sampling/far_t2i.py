"""FAR-T2I's sampling loop: FAR's masked one with a level list, guidance and temperatures of its own (sample_tokens in
the official models/far_t2i.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from far_runtime.engines.base import Array, Engine
from far_runtime.sampling import far
from far_runtime.sampling.base import Condition, KeptRegion, OnStep, Step, per_picture_guidance
from far_runtime.sampling.far import preview_latents as preview_latents
from far_runtime.sampling.noise import NoiseSource
from far_runtime.sampling.schedule import OFFICIAL_GRID, Schedule, floored

SETTINGS: tuple[str, ...] = far.SETTINGS
OFFICIAL_LEVELS = (0, 2, 3, 4, 5, 6, 7, 8, 10, 13)


def resolve_settings(model: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """levels: level list. steps: diffusion steps, one number or one per level. guidance: the same at every level.
    temperature: the final value. shared_noise: as FAR's."""
    official = model["grid"] == OFFICIAL_GRID and not given.get("shared_noise")
    levels = given.get("levels") or (OFFICIAL_LEVELS if official else range(model["grid"]))
    # Levels rise without exception here, as those of the unmasked FAR do.
    return far.resolve_settings({**model, "masked": False}, {**given, "levels": levels})


def schedule_of(model: Mapping[str, Any], settings: Mapping[str, Any]) -> Schedule:
    """The schedule that settings come to: constant guidance, the temperatures of the unmasked FAR."""
    made = far.schedule_of({**model, "masked": False}, settings)
    guidance = floored(float(settings["guidance"]), settings.get("guidance_floor", 1.0))
    return replace(made, guidance=(guidance,) * len(made))


def plan(model: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Step, ...]:
    """One step for every level of the list; every sample but the last is low-passed."""
    seen = {**model, "masked": True}

    def steps(one: Mapping[str, Any]) -> tuple[Step, ...]:
        return far.plan_of(seen, schedule_of(model, one), far.shared_noise(one), filter_first=True)

    return per_picture_guidance(steps, settings)


def sample(
    engine: Engine,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    condition: Condition,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    kept: KeptRegion | None = None,
) -> Array:
    """Latents [B, L, C] (scaled, on the engine's device), through the transformer and denoise stages; kept: as FAR's
    `sample` keeps it."""
    steps = plan(model, settings)
    return far.run_steps(engine, {**model, "masked": True}, steps, condition, noise, on_step, kept)


def first(engine: Engine, model: Mapping[str, Any], step: Step, condition: Condition) -> Array:
    """The transformer's output [B, L, w] at the first step: no token is visible yet."""
    return far.first(engine, {**model, "masked": True}, step, condition)
