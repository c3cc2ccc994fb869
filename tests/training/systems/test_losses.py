"""Losses against their formulas, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from far_models.head import DiffusionHead
from far_runtime.sampling.noise_schedule import cosine_alphas_cumprod
from far_training.systems.losses import (
    DiffusionLoss,
    discretized_log_likelihood,
    gradient_l1,
    kl_per_cell,
    level_weight,
    normal_kl,
)


class FixedHead(DiffusionHead):
    """Answers the same output whatever the input, and keeps the state it was shown."""

    def __init__(self, output: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.output = output

    def forward(self, x, t, condition):  # type: ignore[no-untyped-def]
        self.state = x
        return self.output


def direct(prediction: str, output: np.ndarray, target: np.ndarray, noise: np.ndarray, t: int) -> tuple[float, float]:
    """Error and bound of one token in float64, step by step from the definitions."""
    alpha_bar = cosine_alphas_cumprod()
    before = alpha_bar[t - 1] if t else 1.0
    beta = 1 - alpha_bar[t] / before
    variance = beta * (1 - before) / (1 - alpha_bar[t])
    if t == 0:
        second = 1 - alpha_bar[1] / alpha_bar[0]
        variance = second * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
    guess, values = np.split(output, 2)
    state = math.sqrt(alpha_bar[t]) * target + math.sqrt(1 - alpha_bar[t]) * noise
    if prediction == "epsilon":
        expected = noise
        x0 = (state - math.sqrt(1 - alpha_bar[t]) * guess) / math.sqrt(alpha_bar[t])
    else:
        expected = math.sqrt(alpha_bar[t]) * noise - math.sqrt(1 - alpha_bar[t]) * target
        x0 = math.sqrt(alpha_bar[t]) * state - math.sqrt(1 - alpha_bar[t]) * guess
    error = float(((expected - guess) ** 2).mean())

    def mean_of(clean: np.ndarray) -> np.ndarray:
        return (beta * math.sqrt(before) * clean + (1 - before) * math.sqrt(1 - beta) * state) / (1 - alpha_bar[t])

    share = (values + 1) / 2
    log_var = share * math.log(beta) + (1 - share) * math.log(variance)
    if t == 0:
        deviation = np.exp(0.5 * log_var)
        mean = mean_of(x0)
        likelihood = np.log(
            norm.cdf((target - mean + 1 / 255) / deviation) - norm.cdf((target - mean - 1 / 255) / deviation)
        )
        return error, float(-likelihood.mean() / math.log(2))
    kl = 0.5 * (log_var - math.log(variance) + (variance + (mean_of(target) - mean_of(x0)) ** 2) / np.exp(log_var) - 1)
    return error, float(kl.mean() / math.log(2))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("t", [0, 1, 17, 500, 990])
def test_diffusion_loss_is_the_formula(prediction: str, t: int) -> None:
    rng = np.random.default_rng(t)
    target, noise = 0.5 * rng.standard_normal(6), rng.standard_normal(6)
    output = np.concatenate([noise + 0.01 * rng.standard_normal(6), rng.uniform(-1, 1, 6)])
    if prediction == "v":
        alpha_bar = cosine_alphas_cumprod()[t]
        output[:6] = math.sqrt(alpha_bar) * noise - math.sqrt(1 - alpha_bar) * target + 0.01 * rng.standard_normal(6)
    head = FixedHead(torch.from_numpy(output).float())
    tensors = [torch.from_numpy(x).float() for x in (target, noise)]
    error, bound = DiffusionLoss(prediction)(head, tensors[0], torch.zeros(1), torch.tensor(t), tensors[1])
    wanted_error, wanted_bound = direct(prediction, output, target, noise, t)
    assert float(error) == pytest.approx(wanted_error, rel=1e-3)
    # At t = 0 the official code approximates the normal distribution function by tanh.
    assert float(bound) == pytest.approx(wanted_bound, rel=2e-2 if t == 0 else 2e-3, abs=1e-5)
    assert head.state.shape == (6,)


def test_bound_does_not_train_the_prediction() -> None:
    output = torch.randn(5, 8, requires_grad=True)
    _, bound = DiffusionLoss()(
        FixedHead(output), torch.randn(5, 4), torch.zeros(1), torch.full((5,), 300), torch.randn(5, 4)
    )
    bound.sum().backward()
    assert output.grad is not None
    assert output.grad[:, :4].abs().max() == 0
    assert output.grad[:, 4:].abs().min() > 0


def test_fixed_variance_leaves_the_bound_out() -> None:
    loss = DiffusionLoss(learned_variance=False)
    arguments = (torch.randn(5, 4), torch.zeros(1), torch.full((5,), 300), torch.randn(5, 4))
    error, bound = loss(FixedHead(torch.randn(5, 8)), *arguments)
    assert error.min() > 0
    assert bound.abs().max() == 0


def test_level_weight_is_the_papers() -> None:
    weights = level_weight(torch.arange(16), 16)
    assert weights[15] == pytest.approx(2.0)
    assert weights[0] == pytest.approx(1 + math.sin(math.pi / 32))
    assert weights[7] == pytest.approx(1 + math.sin(math.pi / 4))
    assert (weights.diff() > 0).all()


def test_normal_kl_is_torchs() -> None:
    mean, log_var, other, other_log = torch.randn(4, 50)
    divergence = normal_kl(mean, log_var, other, other_log)
    normals = [torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((mean, log_var), (other, other_log))]
    torch.testing.assert_close(divergence, torch.distributions.kl_divergence(*normals))


def test_outer_bins_reach_to_infinity() -> None:
    far_out = discretized_log_likelihood(torch.tensor([-1.0, 1.0]), torch.tensor([-9.0, 9.0]), torch.zeros(2))
    assert far_out.abs().max() < 1e-3


def test_kl_per_cell_sums_channels() -> None:
    mean = torch.full((2, 3, 4, 4), 2.0)
    assert float(kl_per_cell(mean, torch.zeros_like(mean))) == pytest.approx(3 * 0.5 * 4)


def test_gradient_l1_sees_edges_only() -> None:
    picture = torch.zeros(1, 3, 4, 4)
    assert float(gradient_l1(picture + 0.7, picture)) == 0
    edge = picture.clone()
    edge[..., 2:] = 1
    assert float(gradient_l1(edge, picture)) == pytest.approx(1 / 3)
