"""MAR's sampling loop: tokens in random order, several at each iteration (arXiv 2406.11838 section 3; sample_tokens in
the official models/mar.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.engines.base import Array, Engine
from far_runtime.model_info import MarInfo
from far_runtime.sampling.base import Call, Condition, KeptRegion, OnStep, Plan, Step
from far_runtime.sampling.noise import NoiseSource
from far_runtime.sampling.options import resolve_values
from far_runtime.sampling.reverse_diffusion import diffuse, kept_last, place, place_index, restore_index
from far_runtime.sampling.schedule import floored, make_diffusion, resolve_steps

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quality": {"solver": "dpmpp-2m", "steps": "25:8", "guidance_floor": 1.1},
    "balanced": {"solver": "dpmpp-2m", "steps": "15:5", "guidance_floor": 1.2},
    "fast": {"solver": "dpmpp-2m", "steps": "8:3", "guidance_floor": 1.2},
}
"""A token is drawn once and stays, and the more tokens are known, the fewer steps the next ones need (DiSA, arXiv
2505.20297). The first iterations, with guidance near 1, run without. On a small MAR (epsilon prediction) balanced and
fast had the ratios 1.02 and 1.41 to 50 steps (docs/performance.md)."""


def resolve_settings(model: MarInfo, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All settings as JSON values; FarError for values that cannot be.

    steps and solver: one value, or one per iteration (steps "50:5" fall as in DiSA, arXiv 2505.20297). guidance: rises
    with the share of known tokens under guidance_schedule "linear".
    """
    values = resolve_values("mar", model, overrides)
    return {**values, **resolve_steps(values, values["iterations"], "iterations")}


def masked_counts(tokens: int, iterations: int) -> tuple[int, ...]:
    """Number of tokens that are still masked after each iteration: floor(tokens cos(pi/2 (s + 1) / n)) after iteration
    s of n, but at least 1 and at least one less than before it; 0 after the last."""
    counts, before = [], tokens
    for s in range(iterations - 1):
        before = max(1, min(before - 1, math.floor(tokens * math.cos(math.pi / 2 * (s + 1) / iterations))))
        counts.append(before)
    return (*counts, 0)


def plan(model: MarInfo, settings: Mapping[str, Any], kept: int = 0) -> Plan:
    """One step for every iteration over the tokens that an edit does not keep.

    The linear guidance of an iteration is 1 + (guidance - 1) (share of the tokens drawn after it); in the last one the
    official code still counts one token as masked. With fewer tokens to draw than iterations, each iteration draws one.
    """
    tokens = model.tokens
    free = tokens - kept  # to be drawn
    iterations = min(settings["iterations"], free)
    diffusion = make_diffusion(settings, [settings["temperature"]] * settings["iterations"], "iterations")
    steps, before = [], free
    for i, masked in enumerate(masked_counts(free, iterations)):
        share = (tokens - max(masked, 1)) / tokens
        rising = settings["guidance_schedule"] == "linear"
        guidance = 1 + (settings["guidance"] - 1) * share if rising else settings["guidance"]
        guidance = floored(guidance, settings.get("guidance_floor", 1.0))
        visible, drawn = tokens - before, before - masked
        rows = 1 if guidance == 1 else 2
        calls = (
            Call("transformer", rows=rows, sizes={"count": visible, "tokens": drawn}),
            Call("denoise", times=diffusion[i].steps, rows=rows, sizes={"tokens": drawn}),
        )
        steps.append(
            Step(
                index=i,
                kind="iteration",
                number=i + 1,
                substeps=diffusion[i].steps,
                guidance=guidance,
                constants={},
                calls=calls,
                visible=visible,
                tokens=drawn,
                diffusion=diffusion[i],
            )
        )
        before = masked
    return tuple(steps)


def sample(
    engine: Engine,
    model: MarInfo,
    plan: Plan,
    condition: Condition,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    kept: KeptRegion | None = None,
) -> Array:
    """Latents [B, L, C] (scaled, on the engine's device), drawn by the transformer, denoise and place stages.

    The first tokens of a picture's order are drawn last. Tokens of `kept` are visible from the start and never drawn;
    every picture keeps the same number of them, and the plan is made for that number.
    """
    tokens, channels, batch = model.tokens, model.channels, condition.batch
    orders = noise.orders(tokens)
    if kept is None:
        kept_count, latents = 0, engine.put(np.zeros((batch, tokens, channels), np.float32))
    else:
        kept_count, latents = int(kept.keep[0].sum()), kept.latents
        orders = kept_last(orders, kept.keep)
    free = tokens - kept_count
    if free == 0:
        return latents
    if sum(step.tokens or 0 for step in plan) != free:
        raise ValueError(f"the plan does not draw {free} tokens, as many as are not kept")
    masked = free
    for step in plan:
        assert step.tokens is not None  # every iteration draws some
        drawn = step.tokens
        visible = np.sort(orders[:, masked:], axis=1)
        masked -= drawn
        predicted = np.sort(orders[:, masked : masked + drawn], axis=1)
        index = engine.put(place_index(predicted, tokens))
        if visible.size == 0 and condition.first_output is not None:
            places = np.tile(predicted, (len(condition.first_output) // batch, 1))[..., None]
            head = engine.put(np.take_along_axis(condition.first_output, places, axis=1))
        else:
            head = transform(engine, step, latents, condition.rows(step.guidance), visible, predicted, tokens)

        def finish(state: Array, before: Array = latents, index: Array = index) -> Array:
            return place(engine, before, state, index)

        latents = diffuse(engine, head, step, noise, (drawn, channels), model.prediction, on_step, finish)
    return latents


def first(engine: Engine, model: MarInfo, step: Step, condition: Condition) -> Array:
    """The transformer's output [B, L, w] at the first step of a `FirstStep`, which sees no token, at every position."""
    batch, tokens = condition.batch, model.tokens
    latents = engine.put(np.zeros((batch, tokens, model.channels), np.float32))
    positions = np.tile(np.arange(tokens, dtype=np.int64), (batch, 1))
    return transform(engine, step, latents, condition.cond, positions[:, :0], positions, tokens)


def transform(
    engine: Engine,
    step: Step,
    latents: Array,
    rows: Mapping[str, Array],
    visible: NDArray[np.int64],
    predicted: NDArray[np.int64],
    tokens: int,
) -> Array:
    """The transformer's output [g B, T, w], the diffusion head's condition, at the positions `predicted` [B, T].

    It sees the latents [B, L, C] at the positions `visible` [B, V] and the `rows` of a condition. `tokens` is L; g is 2
    with guidance, 1 without.
    """
    inputs = {
        "latents": latents,
        **rows,
        "visible": engine.put(visible),
        "restore": engine.put(restore_index(visible, tokens)),
        "predicted": engine.put(predicted),
    }
    return engine.run("transformer", inputs, step.constants)["condition"]


def preview_latents(model: MarInfo, plan: Plan, samples: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """The latents after each iteration, with zeros in place of the tokens that are not drawn yet."""
    return list(samples)
