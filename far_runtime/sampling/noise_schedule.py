"""Noise schedule and posterior of the diffusion head (official diffusion/gaussian_diffusion.py and respace.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TRAIN_STEPS = 1000
PREDICTIONS = ("epsilon", "v")


def cosine_alphas_cumprod() -> NDArray[np.float64]:
    """alpha_bar [1000] of the cosine schedule, betas capped at 0.999."""
    u = np.arange(TRAIN_STEPS + 1, dtype=np.float64) / TRAIN_STEPS
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return np.cumprod(1 - betas)


def respaced_timesteps(steps: int, start: int = TRAIN_STEPS - 1) -> NDArray[np.int64]:
    """The `steps` training timesteps that the official sampler visits, rising: round(i start / (steps - 1)); one step
    visits `start` alone. ValueError for more steps than there are."""
    if not 1 <= steps <= start + 1 <= TRAIN_STEPS:
        raise ValueError(f"{steps} diffusion steps from {start}; expected 1 to {start + 1}")
    if steps == 1:
        return np.array([start])
    stride = start / (steps - 1)
    return np.array([round(i * stride) for i in range(steps)])


@dataclass(frozen=True)
class Posterior:
    """Constants of q(x_prev | x_t, x_0) for a rising list of timesteps, each [S]; shared by sampling and by the
    training loss."""

    timesteps: NDArray[np.int64]
    alphas_cumprod: NDArray[np.float64]
    log_betas: NDArray[np.float64]
    log_variance: NDArray[np.float64]
    mean_x0: NDArray[np.float64]
    mean_xt: NDArray[np.float64]


def posterior(timesteps: Sequence[int] | NDArray[np.int64]) -> Posterior:
    """Posterior constants with betas recomputed from the kept cumulative products.

    The posterior variance of the first timestep is 0; the second one's stands in for it in `log_variance`.
    """
    kept = cosine_alphas_cumprod()[np.asarray(timesteps)]
    before = np.append(1.0, kept[:-1])
    betas = 1 - kept / before
    variance = betas * (1 - before) / (1 - kept)
    floor = variance[1] if len(variance) > 1 else betas[0]
    return Posterior(
        timesteps=np.asarray(timesteps),
        alphas_cumprod=kept,
        log_betas=np.log(betas),
        log_variance=np.log(np.append(floor, variance[1:])),
        mean_x0=betas * np.sqrt(before) / (1 - kept),
        mean_xt=(1 - before) * np.sqrt(1 - betas) / (1 - kept),
    )


def x0_from_output(
    alphas_cumprod: NDArray[np.float64], prediction: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coefficients (a, b), each [S], with x0 = a x_t + b output, for "epsilon" or "v" prediction; ValueError for
    another name."""
    if prediction == "epsilon":
        return 1 / np.sqrt(alphas_cumprod), -np.sqrt(1 / alphas_cumprod - 1)
    if prediction == "v":
        return np.sqrt(alphas_cumprod), -np.sqrt(1 - alphas_cumprod)
    raise ValueError(f"prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")
