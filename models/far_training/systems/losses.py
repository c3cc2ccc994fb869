"""Losses: the diffusion loss of the head, FAR's level weight, and the terms of the VAEs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from far_models.head import DiffusionHead
from far_runtime.sampling.noise_schedule import TRAIN_STEPS, posterior, x0_from_output


def level_weight(level: Tensor, levels: int) -> Tensor:
    """Frequency-aware loss weight 1 + sin(pi/2 (level + 1) / levels) of levels [...] (FAR section 3.3)."""
    return 1 + torch.sin(math.pi / 2 * (level.float() + 1) / levels)


class DiffusionLoss(nn.Module):
    """Loss of denoising single tokens: squared error of the prediction, and the variational bound of the variance.

    The bound is in bits per dimension and is not rescaled. The prediction is detached in its mean, so that the bound
    trains the variance alone (official diffusion/gaussian_diffusion.py with its defaults). `learned_variance=False`
    leaves it out.
    """

    def __init__(self, prediction: str = "epsilon", learned_variance: bool = True) -> None:
        super().__init__()
        constants = posterior(range(TRAIN_STEPS))
        a, b = x0_from_output(constants.alphas_cumprod, prediction)
        tables = {
            "signal": constants.alphas_cumprod**0.5,
            "noise": (1 - constants.alphas_cumprod) ** 0.5,
            "log_beta": constants.log_betas,
            "log_posterior": constants.log_variance,
            "mean_x0": constants.mean_x0,
            "mean_xt": constants.mean_xt,
            # x0 is eliminated in float64: at t = 999 it is 2e4 times an epsilon prediction.
            "mean_state": constants.mean_x0 * a + constants.mean_xt,
            "mean_output": constants.mean_x0 * b,
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table).float(), persistent=False)
        self.prediction = prediction
        self.learned_variance = learned_variance

    def forward(
        self, head: DiffusionHead, target: Tensor, condition: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Squared error and bound [...] of clean tokens and noise [..., C], condition [..., width], timesteps [...]."""
        at = {name: table[t].unsqueeze(-1) for name, table in self.named_buffers()}
        state = at["signal"] * target + at["noise"] * noise
        output, variance = head(state, t, condition).float().chunk(2, dim=-1)
        prediction = noise if self.prediction == "epsilon" else at["signal"] * noise - at["noise"] * target
        error = (prediction - output).square().mean(-1)
        if not self.learned_variance:
            return error, torch.zeros_like(error)
        share = (variance + 1) / 2
        log_variance = share * at["log_beta"] + (1 - share) * at["log_posterior"]
        mean = at["mean_state"] * state + at["mean_output"] * output.detach()
        true_mean = at["mean_x0"] * target + at["mean_xt"] * state
        divergence = normal_kl(true_mean, at["log_posterior"], mean, log_variance)
        likelihood = discretized_log_likelihood(target, mean, 0.5 * log_variance)
        bound = torch.where(t == 0, -likelihood.mean(-1), divergence.mean(-1)) / math.log(2)
        return error, bound


def token_losses(
    loss: DiffusionLoss, head: DiffusionHead, target: Tensor, condition: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared error and bound [B, T, draws] of clean tokens [B, T, C] under conditions [B, T, width].

    Each token is denoised at several timesteps t [B, T, draws], each with its own noise [B, T, draws, C]
    (diffusion_batch_mul).
    """
    error, bound = loss(head, target.unsqueeze(2).expand_as(noise), condition.unsqueeze(2), t, noise)
    return error, bound


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL divergence in nats of one diagonal normal from another, elementwise."""
    difference = log_variance - other_log_variance
    return 0.5 * (difference.exp() - difference - 1 + (mean - other_mean).square() * (-other_log_variance).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability in nats of the bin of width 2/255 around x under a normal; the outer bins reach to infinity.

    The normal's distribution function is the tanh approximation of the official diffusion/diffusion_utils.py.
    """

    def cdf(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    scale = torch.exp(-log_scale)
    upper = cdf(scale * (x - mean + 1 / 255))
    lower = cdf(scale * (x - mean - 1 / 255))
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()


def kl_per_cell(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence in nats of latents [B, C, h, w] from the standard normal: channels summed, mean over the cells."""
    terms = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return terms.sum(1).mean()


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical pixel differences of pictures [B, 3, H, W]."""
    difference = a - b
    across = (difference[..., :, 1:] - difference[..., :, :-1]).abs().mean()
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    return across + down
