"""What the loops with a diffusion head share: the reverse diffusion of one step, and the choice of tokens by index."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from far_runtime.engines.base import Array, Engine, scalar
from far_runtime.sampling.base import OnStep, Step
from far_runtime.sampling.noise import NoiseSource
from far_runtime.sampling.solvers import COEFFICIENTS, Diffusion

NOISE = COEFFICIENTS.index("noise")


def diffuse(
    engine: Engine,
    condition: Array,
    step: Step,
    noise: NoiseSource,
    shape: tuple[int, int],
    prediction: str,
    on_step: OnStep | None = None,
    finish: Callable[[Array], Array] = lambda sample: sample,
) -> Array:
    """A sample [B, *shape] of the diffusion head under `condition` [g B, T, w], by all diffusion steps of one step of
    the loop.

    g is 2 with guidance, 1 without. `finish` turns the sample into the state that the step ends with.
    """
    diffusion = diffusion_of(step)
    timesteps, table = diffusion.table(prediction)
    tokens, channels = shape
    # Shared noise is drawn for one token and repeated: noise that differs between tokens would average out in the
    # low-pass.
    drawn_tokens = 1 if step.shared else tokens

    def repeat(draw: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.repeat(draw, tokens, axis=1) if step.shared else draw

    start = repeat(noise.start(step.index, drawn_tokens, channels)) * np.float32(diffusion.start_scale)
    state, guidance = engine.put(start), engine.put(step.guidance_scales(len(start)))
    step_noise, history = state, state
    for i, (timestep, coefficients) in enumerate(zip(timesteps, table, strict=True)):
        if coefficients[NOISE] != 0:  # otherwise any array will do: it is multiplied by 0
            step_noise = engine.put(repeat(noise.diffusion(step.index, i, drawn_tokens, channels)))
        inputs = {
            "state": state,
            "condition": condition,
            "timestep": engine.put(scalar(timestep)),
            "coefficients": engine.put(coefficients),
            "guidance": guidance,
            "noise": step_noise,
            "history": history,
        }
        outputs = engine.run("denoise", inputs)
        state, history = outputs["next_state"], outputs["next_history"]
        if i == step.substeps - 1:
            state = finish(state)
        if on_step is not None:
            on_step(step, i + 1, state)
    return state


def diffusion_of(step: Step) -> Diffusion:
    """How a step draws from the diffusion head."""
    assert step.diffusion is not None, f"{step.name} has no diffusion"
    return step.diffusion


def restore_index(visible: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """For every position [B, tokens] its place in `visible` [B, V], or V where it is hidden."""
    batch, count = visible.shape
    restore = np.full((batch, tokens), count, np.int64)
    np.put_along_axis(restore, visible, np.broadcast_to(np.arange(count), (batch, count)), axis=1)
    return restore


def place_index(positions: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """The place stage's index [B, tokens] that puts a sample's tokens at `positions` [B, T] and keeps the others."""
    batch, count = positions.shape
    index = np.tile(np.arange(tokens, dtype=np.int64), (batch, 1))
    np.put_along_axis(index, positions, tokens + np.broadcast_to(np.arange(count), (batch, count)), axis=1)
    return index


def keep_index(keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The place stage's index [B, L] that takes the kept cells [B, h, w] from its array `sample`, the others from its
    array `latents`."""
    kept = keep.reshape(len(keep), -1)
    places = np.arange(kept.shape[1], dtype=np.int64)
    return np.where(kept, kept.shape[1] + places, places)


def kept_last(orders: NDArray[np.int64], keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Orders [B, L] with the kept cells [B, h, w] moved to the end: masked models see the last tokens first."""
    kept = np.take_along_axis(keep.reshape(orders.shape), orders, axis=1)
    return np.take_along_axis(orders, np.argsort(kept, axis=1, kind="stable"), axis=1)


def place(engine: Engine, latents: Array, sample: Array, index: Array) -> Array:
    """Latents [B, L, C] whose tokens are chosen by index [B, L] from those of `latents` [B, L, C] and, behind them, of
    `sample` [B, T, C]."""
    return engine.run("place", {"latents": latents, "sample": sample, "index": index})["latents_out"]
