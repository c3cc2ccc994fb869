"""Noise schedule and posterior of the diffusion head (official diffusion/gaussian_diffusion.py and respace.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TRAIN_STEPS = 1000
"""Timesteps of the training; timestep 999 is almost pure noise."""

PREDICTIONS = ("epsilon", "v")
"""What a diffusion head may predict."""


def cosine_alphas_cumprod() -> NDArray[np.float64]:
    """alpha_bar [1000] of the cosine schedule, with betas of at most 0.999."""
    u = np.arange(TRAIN_STEPS + 1, dtype=np.float64) / TRAIN_STEPS
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return np.cumprod(1 - betas)


def respaced_timesteps(steps: int, start: int = TRAIN_STEPS - 1) -> NDArray[np.int64]:
    """The `steps` training timesteps of the official sampler, rising: round(i start / (steps - 1)), or `start` alone.

    ValueError for more steps than there are timesteps up to `start`.
    """
    if not 1 <= steps <= start + 1 <= TRAIN_STEPS:
        raise ValueError(f"{steps} diffusion steps from {start}; expected 1 to {start + 1}")
    if steps == 1:
        return np.array([start])
    stride = start / (steps - 1)
    return np.array([round(i * stride) for i in range(steps)])


@dataclass(frozen=True)
class Posterior:
    """Constants of q(x_prev | x_t, x_0) for S timesteps, each [S], which sampling and the training loss share."""

    timesteps: NDArray[np.int64]
    """The training timesteps, rising."""
    alphas_cumprod: NDArray[np.float64]
    """alpha_bar at each."""
    log_betas: NDArray[np.float64]
    """Logarithm of beta, the largest variance of a step."""
    log_variance: NDArray[np.float64]
    """Logarithm of the posterior variance, the smallest variance of a step."""
    mean_x0: NDArray[np.float64]
    """Factor of x_0 in the posterior mean."""
    mean_xt: NDArray[np.float64]
    """Factor of x_t in the posterior mean."""


def posterior(timesteps: Sequence[int] | NDArray[np.int64]) -> Posterior:
    """The posterior of rising timesteps, with betas recomputed from the alpha_bars at these.

    The posterior variance at the first timestep is 0; `log_variance` has that of the second one in its place.
    """
    alpha_bar = cosine_alphas_cumprod()[np.asarray(timesteps)]
    before = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / before
    variance = betas * (1 - before) / (1 - alpha_bar)
    floor = variance[1] if len(variance) > 1 else betas[0]
    return Posterior(
        timesteps=np.asarray(timesteps),
        alphas_cumprod=alpha_bar,
        log_betas=np.log(betas),
        log_variance=np.log(np.append(floor, variance[1:])),
        mean_x0=betas * np.sqrt(before) / (1 - alpha_bar),
        mean_xt=(1 - before) * np.sqrt(1 - betas) / (1 - alpha_bar),
    )


def x0_from_output(
    alphas_cumprod: NDArray[np.float64], prediction: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients a and b, each [S], of x_0 = a x_t + b output, for one of PREDICTIONS; ValueError for another."""
    if prediction == "epsilon":
        return 1 / np.sqrt(alphas_cumprod), -np.sqrt(1 / alphas_cumprod - 1)
    if prediction == "v":
        return np.sqrt(alphas_cumprod), -np.sqrt(1 - alphas_cumprod)
    raise ValueError(f"prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")
