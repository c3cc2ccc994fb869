"""FAR's sampling loop, unmasked and masked (FAR section 3; sample_tokens_nomask and sample_tokens_mask in the
official models/far.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.diffusion import ddpm_table
from far_runtime.engines.base import Array, Engine, scalar
from far_runtime.noise import NoiseSource
from far_runtime.schedule import Schedule


@dataclass(frozen=True)
class Step:
    """One step of the loop. `lowpass`: the level that the previous sample is filtered to (grid: not at all);
    `visible`: how many tokens the encoder sees.
    """

    index: int
    level: int
    lowpass: int
    visible: int
    diffusion_steps: int
    guidance: float
    temperature: float

    @property
    def constants(self) -> dict[str, int]:
        """What a transformer graph may have folded in."""
        return {"level": self.level, "lowpass": self.lowpass, "count": self.visible}


OnStep = Callable[[Step, int, Array], None]
"""Called after every diffusion step with the step, the number of diffusion steps done in it, and the state [B, L,
C]."""


def plan(schedule: Schedule, grid: int, masked: bool) -> tuple[Step, ...]:
    """The steps of a schedule over a grid x grid latent.

    Masked: step s of n sees L - floor(L cos(pi/2 s/n)) tokens, and the first step's sample is not low-passed.
    """
    tokens, count = grid * grid, len(schedule)
    steps = []
    for i, level in enumerate(schedule.levels):
        visible = tokens - math.floor(tokens * math.cos(math.pi / 2 * i / count)) if masked else tokens
        lowpass = grid if masked and i <= 1 else level
        steps.append(Step(i, level, lowpass, visible, schedule.steps[i], schedule.guidance[i], schedule.temperature[i]))
    return tuple(steps)


def sample(
    engine: Engine,
    model: Mapping[str, Any],
    schedule: Schedule,
    labels: Sequence[int],
    noise: NoiseSource,
    on_step: OnStep | None = None,
) -> Array:
    """Latents [B, L, C] (scaled, on the engine's device) of `labels`, through the transformer and denoise stages.

    `model` is the manifest's: grid, channels, classes, masked, prediction. The label `classes` is the null class. A
    step with guidance 1 runs without its unconditional half.
    """
    grid, channels, masked = model["grid"], model["channels"], model["masked"]
    tokens, batch = grid * grid, len(labels)
    conditional = np.asarray(labels, np.int64)
    both = np.concatenate([conditional, np.full(batch, model["classes"], np.int64)])
    orders = noise.orders(tokens) if masked else None
    latents = engine.put(np.zeros((batch, tokens, channels), np.float32))
    for step in plan(schedule, grid, masked):
        inputs = {"latents": latents, "labels": engine.put(conditional if step.guidance == 1 else both)}
        if orders is not None:
            visible, restore = visible_tokens(orders, step.visible)
            inputs |= {"visible": engine.put(visible), "restore": engine.put(restore)}
        condition = engine.run("transformer", inputs, step.constants)["condition"]
        latents = diffuse(engine, condition, step, noise, (tokens, channels), model["prediction"], on_step)
    return latents


def diffuse(
    engine: Engine,
    condition: Array,
    step: Step,
    noise: NoiseSource,
    shape: tuple[int, int],
    prediction: str,
    on_step: OnStep | None = None,
) -> Array:
    """The head's sample [B, *shape] under `condition` [g B, L, w]: the reverse diffusion of one step of the loop."""
    timesteps, table = ddpm_table(step.diffusion_steps, step.temperature, prediction)
    state = engine.put(noise.start(step.index, *shape))
    guidance, drawn = engine.put(scalar(step.guidance)), state
    for i, (timestep, coefficients) in enumerate(zip(timesteps, table, strict=True)):
        if i < step.diffusion_steps - 1:  # the last step adds no noise: the array of the one before is multiplied by 0
            drawn = engine.put(noise.diffusion(step.index, i, *shape))
        inputs = {
            "state": state,
            "condition": condition,
            "timestep": engine.put(scalar(timestep)),
            "coefficients": engine.put(coefficients),
            "guidance": guidance,
            "noise": drawn,
        }
        state = engine.run("denoise", inputs)["next_state"]
        if on_step is not None:
            on_step(step, i + 1, state)
    return state


def visible_tokens(orders: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices [B, count] of the last `count` tokens of each order, rising, and the place of every position among them
    [B, L] (count where it is hidden).
    """
    batch, tokens = orders.shape
    visible = np.sort(orders[:, tokens - count :], axis=1)
    restore = np.full((batch, tokens), count, np.int64)
    np.put_along_axis(restore, visible, np.broadcast_to(np.arange(count), (batch, count)), axis=1)
    return visible, restore
