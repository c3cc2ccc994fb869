"""Solvers of the diffusion head's reverse process, as tables of coefficients for the denoise stage: all solvers use the
same graph with different numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from far_runtime.sampling.noise_schedule import (
    PREDICTIONS,
    TRAIN_STEPS,
    cosine_alphas_cumprod,
    posterior,
    respaced_timesteps,
    x0_from_output,
)

SOLVERS = ("ddpm", "ddim", "dpmpp-2m", "dpmpp-2m-sde")
"""DDPM with learned variance (the official sampler), DDIM (Song et al. 2021, eta 0), and DPM-Solver++ 2M (Lu et al.
2022, algorithm 2) as an ODE and as an SDE. Guidance acts on the network's output in all, as in the official code."""

ODE_SOLVERS = ("ddim", "dpmpp-2m")
"""The solvers that draw no noise but the start noise."""

STARTS = {"epsilon": 950, "v": TRAIN_STEPS - 1}
"""Timestep at which the solvers other than ddpm begin, by what the network predicts. With epsilon prediction an error
of the network at timestep 999 becomes an error 2e4 times as large in x0; at 950, 13 times as large."""

COEFFICIENTS = ("state", "output", "log_beta", "log_posterior", "noise", "history", "x0_state", "x0_output")
"""Columns of a solver's table (`Diffusion.table`)."""


@dataclass(frozen=True)
class Diffusion:
    """How one step of the loop draws from the diffusion head."""

    steps: int
    """Number of diffusion steps."""
    solver: str = "ddpm"
    """One of SOLVERS."""
    start: int | None = None
    """Timestep of the first diffusion step; None: the solver's default."""
    temperature: float = 1.0
    """Factor of the noise that is added; for the ODE solvers, which add none, of the start noise."""

    def table(self, prediction: str = "epsilon") -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Timesteps [S] and coefficients [S, 8] in the order in which they are applied, the last timestep first.

        One diffusion step is

            next = state x + output o + history h + noise exp(0.5 log var) n
            next h = x0_state x + x0_output o  (0 for ddpm, which does not use it)

        where x is the state, o the guided prediction, n standard normal noise, and h the prediction of x0 at the step
        before, which multistep solvers use. The variance is  log var = f log_beta + (1 - f) log_posterior  with
        f = (v + 1) / 2 and v the variance values of the conditional half. x0 is eliminated from the update in float64,
        since at timestep 999 it is 2e4 times the prediction. The last step adds no noise and, except for ddpm, ends at
        the prediction of x0. ValueError for an unknown solver or prediction, and for more steps than timesteps.
        """
        if self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r}; known: {', '.join(SOLVERS)}")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")
        start = self.start_of(prediction)
        if self.solver == "ddpm":
            timesteps, table = _ddpm(self.steps, start, prediction)
        else:
            timesteps, table = _few_steps(self.solver, self.steps, start, prediction)
        table[:, COEFFICIENTS.index("noise")] *= self.temperature
        return timesteps.astype(np.float32), np.ascontiguousarray(table, dtype=np.float32)

    def start_of(self, prediction: str) -> int:
        """The timestep of the first diffusion step.

        Without a `start` it is 999 for ddpm; for the others it is that of STARTS, or later where there are more steps.
        """
        if self.start is not None:
            return self.start
        return TRAIN_STEPS - 1 if self.solver == "ddpm" else max(STARTS[prediction], self.steps - 1)

    @property
    def start_scale(self) -> float:
        """Factor of the start noise.

        The ODE solvers add no noise that the temperature could scale, so it scales the noise that they start from. That
        comes nearer to the official sampler's pictures than no temperature (docs/performance.md).
        """
        return self.temperature if self.solver in ODE_SOLVERS else 1.0


def trailing_timesteps(steps: int, start: int) -> NDArray[np.int64]:
    """`steps` timesteps that fall from `start` in equal strides and would reach -1, the clean sample, with one more.

    This is "trailing" spacing (Lin et al. 2024, section 3.3). ValueError for more steps than timesteps up to `start`.
    """
    if not 1 <= steps <= start + 1 <= TRAIN_STEPS:
        raise ValueError(f"{steps} diffusion steps from {start}; expected 1 to {start + 1}")
    return np.round((start + 1) * (1 - np.arange(steps) / steps)).astype(np.int64) - 1


def _ddpm(steps: int, start: int, prediction: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Timesteps [S] and coefficients [S, 8] of the official sampler (gaussian_diffusion.py, p_sample)."""
    constants = posterior(respaced_timesteps(steps, start))
    a, b = x0_from_output(constants.alphas_cumprod, prediction)
    noise = np.ones(steps)
    noise[0] = 0.0
    columns = {
        "state": constants.mean_x0 * a + constants.mean_xt,
        "output": constants.mean_x0 * b,
        "log_beta": constants.log_betas,
        "log_posterior": constants.log_variance,
        "noise": noise,
        "history": np.zeros(steps),
        "x0_state": np.zeros(steps),
        "x0_output": np.zeros(steps),
    }
    return constants.timesteps[::-1], np.stack([columns[name] for name in COEFFICIENTS], axis=1)[::-1].copy()


def _few_steps(solver: str, steps: int, start: int, prediction: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Timesteps [S] and coefficients [S, 8] of ddim and the DPM-Solver++ family, over trailing timesteps."""
    timesteps = trailing_timesteps(steps, start)
    alpha_bar = np.append(cosine_alphas_cumprod()[timesteps], 1.0)  # 1: the clean sample
    a, b = x0_from_output(alpha_bar[:-1], prediction)
    rows = []
    for i, (state, x0, history, noise) in enumerate(_updates(solver, alpha_bar)):
        columns = {
            "state": state + x0 * a[i],
            "output": x0 * b[i],
            "log_beta": 0.0,
            "log_posterior": 0.0,
            "noise": noise,
            "history": history,
            "x0_state": a[i],
            "x0_output": b[i],
        }
        rows.append([columns[name] for name in COEFFICIENTS])
    return timesteps, np.array(rows, np.float64)


def _updates(solver: str, alphas_cumprod: NDArray[np.float64]) -> Iterator[tuple[float, float, float, float]]:
    """For every step between these alpha_bars [S + 1] the factors of the state, x0, the x0 before it, and the noise."""
    alpha, sigma = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha) - np.log(sigma)  # half the logarithm; infinite at the clean sample
    before = None
    for i, j in pairwise(range(len(alpha))):
        stride = log_snr[j] - log_snr[i]
        decay = np.exp(-stride)  # sigma_j alpha_i / (alpha_j sigma_i)
        if solver == "dpmpp-2m-sde":
            state = sigma[j] / sigma[i] * decay
            gain, noise = alpha[j] * -np.expm1(-2 * stride), sigma[j] * np.sqrt(-np.expm1(-2 * stride))
        else:
            state, gain, noise = sigma[j] / sigma[i], alpha[j] * -np.expm1(-stride), 0.0
        second = 0.0
        if solver != "ddim" and before is not None and np.isfinite(stride):
            second = gain * stride / (2 * before)
        yield float(state), float(gain + second), float(-second), float(noise)
        before = stride
