"""FAR's sampling loop, unmasked and masked (FAR section 3; sample_tokens_nomask and sample_tokens_mask in the
official models/far.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.engines.base import Array, Engine
from far_runtime.errors import FarError, SettingName
from far_runtime.model_info import FarInfo, FarT2iInfo
from far_runtime.sampling.base import Call, Condition, KeptRegion, OnStep, Plan, Step
from far_runtime.sampling.lowpass import lowpass
from far_runtime.sampling.noise import NoiseSource
from far_runtime.sampling.options import resolve_values
from far_runtime.sampling.reverse_diffusion import diffuse, keep_index, kept_last, place, restore_index
from far_runtime.sampling.schedule import (
    Schedule,
    check_levels,
    comma_separated,
    make_schedule,
    official_levels,
    parse_levels,
    resolve_steps,
)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quality": {"solver": "dpmpp-2m", "steps": 8},
    "balanced": {"solver": "dpmpp-2m", "steps": 5},
    "fast": {"solver": "dpmpp-2m", "steps": 3},
}
"""A sample is low-passed and drawn again at the next level, so that all levels but the last may be coarse. On the
zoo's model the presets' ratios to the official settings were 0.94, 0.95 and 1.03 (docs/performance.md); other models
may need more steps, which far tune finds."""


def resolve_settings(model: FarInfo, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, as `resolve_level_settings` returns them."""
    official = official_levels(model.grid, model.masked)
    return resolve_level_settings(resolve_values("far", model, overrides), official, model.grid, model.masked)


def resolve_level_settings(
    values: Mapping[str, Any], official: Sequence[int], grid: int, masked: bool
) -> dict[str, Any]:
    """All settings of a loop over levels as JSON values, from those of `resolve_values` and the official level list.

    steps and solver: one value, or one per level. guidance and temperature: the final values, before the schedule
    spreads them over the steps. shared_noise: at levels below it all tokens of a picture draw with the same noise,
    which suits models that learned the next level's latents there (1 for `first` = "mean" in far_training.systems.far,
    0 officially). FarError for levels and steps that do not fit.
    """
    shared = values["shared_noise"]
    levels = parse_levels(values["levels"] or (range(grid) if shared else official))
    check_levels(levels, grid, masked)
    check_shared_noise_levels(levels, shared)
    return {**values, "levels": levels, **resolve_steps(values, len(levels))}


def check_shared_noise_levels(levels: Sequence[int], shared: int) -> None:
    """FarError unless every level that shares its noise is followed by the next one."""
    for level, following in pairwise(levels):
        if level < shared and following != level + 1:
            raise FarError(
                SettingName("levels"), f" {comma_separated(levels)}: with ", SettingName("shared_noise"),
                f" {shared} level {level} draws what level {level + 1} sees; put {level + 1} after {level}",
            )  # fmt: skip


def plan(model: FarInfo, settings: Mapping[str, Any], kept: int = 0) -> Plan:
    """One step for every level of the list; `kept` changes nothing."""
    return plan_of(model, make_schedule(settings, model.masked), settings.get("shared_noise", 0))


def plan_of(model: FarInfo | FarT2iInfo, schedule: Schedule, shared_noise: int = 0, filter_first: bool = False) -> Plan:
    """The steps of a schedule.

    The constants of a step are `level`, the level of its input; `lowpass`, the level that the sample before is filtered
    to (the grid: it is not filtered); and `count`, the number of tokens that the encoder sees. Step s of n of a masked
    model sees L - floor(L cos(pi/2 s/n)) tokens, and its first sample is filtered only with `filter_first`.
    """
    grid, masked, tokens, count = model.grid, model.masked, model.tokens, len(schedule)
    unfiltered = masked and not filter_first
    steps = []
    for i, level in enumerate(schedule.levels):
        visible = tokens - math.floor(tokens * math.cos(math.pi / 2 * i / count)) if masked else tokens
        constants = {"level": level, "lowpass": grid if unfiltered and i <= 1 else level, "count": visible}
        diffusion, guidance = schedule.diffusion[i], schedule.guidance[i]
        rows = 1 if guidance == 1 else 2
        calls = (
            Call("transformer", rows=rows, constants=constants, sizes={"count": visible}),
            Call("denoise", times=diffusion.steps, rows=rows),
        )
        steps.append(
            Step(
                index=i,
                kind="level",
                number=level,
                substeps=diffusion.steps,
                guidance=guidance,
                constants=constants,
                calls=calls,
                visible=visible,
                diffusion=diffusion,
                shared=level < shared_noise,
            )
        )
    return tuple(steps)


def sample(
    engine: Engine,
    model: FarInfo | FarT2iInfo,
    plan: Plan,
    condition: Condition,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    kept: KeptRegion | None = None,
    latents: Array | None = None,
) -> Array:
    """Latents [B, L, C] (scaled, on the engine's device), drawn by the transformer and denoise stages.

    A step with guidance 1 runs without its unconditional half. After every step the latents of `kept` replace the
    sample in the kept cells, so that the next level is low-passed from them; a masked model sees these cells first.
    A plan may lack its first steps: `latents` [B, L, C] are then the state after them.
    """
    tokens, channels = model.tokens, model.channels
    orders = noise.orders(tokens) if model.masked else None
    if latents is None:
        latents = engine.put(np.zeros((condition.batch, tokens, channels), np.float32))
    index = None if kept is None else engine.put(keep_index(kept.keep))
    if orders is not None and kept is not None:
        orders = kept_last(orders, kept.keep)

    def finish(state: Array) -> Array:
        return state if kept is None else place(engine, state, kept.latents, index)

    for step in plan:
        if step.index == 0 and condition.first_output is not None:
            head = engine.put(condition.first_output)
        else:
            head = transform(engine, step, latents, condition.rows(step.guidance), orders)
        latents = diffuse(engine, head, step, noise, (tokens, channels), model.prediction, on_step, finish)
    return latents


def first(engine: Engine, model: FarInfo | FarT2iInfo, step: Step, condition: Condition) -> Array:
    """The transformer's output [B, L, w] at the first step of a `FirstStep`."""
    # Low-passed zeros are zeros at every level, and a masked model sees no token yet.
    latents = engine.put(np.zeros((condition.batch, model.tokens, model.channels), np.float32))
    orders = np.tile(np.arange(model.tokens, dtype=np.int64), (condition.batch, 1)) if model.masked else None
    return transform(engine, step, latents, condition.cond, orders)


def transform(
    engine: Engine, step: Step, latents: Array, rows: Mapping[str, Array], orders: NDArray[np.int64] | None
) -> Array:
    """The transformer's output [g B, L, w], the diffusion head's condition, for latents [B, L, C] and the `rows` of a
    condition; `orders` [B, L] for a masked model. g is 2 with guidance, 1 without."""
    inputs = {"latents": latents, **rows}
    if orders is not None:
        visible, restore = visible_tokens(orders, step.constants["count"])
        inputs |= {"visible": engine.put(visible), "restore": engine.put(restore)}
    return engine.run("transformer", inputs, step.constants)["condition"]


def preview_latents(
    model: FarInfo | FarT2iInfo, plan: Plan, samples: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """The samples [B, L, C], low-passed to the level of the next step, which sees them so; the last one unchanged."""
    filtered = [lowpass(sample, step.number) for sample, step in zip(samples, plan[1:], strict=False)]
    return [*filtered, samples[-1]]


def visible_tokens(orders: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which tokens a masked model sees: the last `count` of each order [B, L].

    Returns their indices [B, count], rising, and for every position its place among them [B, L], `count` where it is
    hidden.
    """
    tokens = orders.shape[1]
    visible = np.sort(orders[:, tokens - count :], axis=1)
    return visible, restore_index(visible, tokens)
