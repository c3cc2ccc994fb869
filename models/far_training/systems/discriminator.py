"""A discriminator of picture patches, against which a decoder learns to draw what is crisp."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE, GROUPS = 0.2, 8
SMALLEST = 12
"""Side in pixels of the smallest picture that gives a score."""


@dataclass(frozen=True)
class AdversarialSettings:
    """How strongly the decoder is trained against a discriminator, and how wide that is.

    `adversarial`: the gradient that reaches a picture from the discriminator is given this part of the norm of the
    reconstruction loss's (VQGAN, section 3.1, weighs by the gradients at the decoder's last layer: taken at every
    picture, it costs no second pass through the decoder, and micro-batches add up to the whole batch). 0: there is no
    discriminator. `adversarial_from`: share of the run from which it counts; the discriminator learns from the start.
    `discriminator_width`: channels of its first convolution.
    """

    adversarial: float = 0.0
    adversarial_from: float = 0.05
    discriminator_width: int = 64


class PatchDiscriminator(nn.Module):
    """Scores [B, 1, h, w] of overlapping patches of pictures [B, 3, S, S]: how real they look.

    pix2pix's discriminator with two strided convolutions of four, so that a patch is of 34 pixels, for pictures of 64;
    group norm in place of batch norm, so that a score is of one picture alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(math.gcd(GROUPS, 2 * width), 2 * width),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(2 * width, 4 * width, 4, padding=1),
            nn.GroupNorm(math.gcd(GROUPS, 4 * width), 4 * width),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(4 * width, 1, 4, padding=1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        scores: Tensor = self.layers(pictures)
        return scores


def adversarial_losses(
    discriminator: PatchDiscriminator, decoded: Tensor, pictures: Tensor, reconstruction: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """The decoder's and the discriminator's loss (hinge) for decoded and real pictures [B, 3, S, S].

    reconstruction: the loss [] between them, a function of `decoded`. strength []: see AdversarialSettings. The
    decoder's is 0 in value; its gradient is that of the mean score, times strength and each picture's ratio of norms.
    """
    shown = decoded.detach().requires_grad_().clone()  # no leaf: PyTorch's FLOP counter cannot follow a gradient to one
    fake = discriminator(shown)
    loss = 0.5 * (F.relu(1 + fake).mean() + F.relu(1 - discriminator(pictures)).mean())
    if not decoded.requires_grad:
        return torch.zeros_like(loss), loss
    (towards_real,) = torch.autograd.grad(-fake.mean(), shown, retain_graph=True)
    (towards_picture,) = torch.autograd.grad(reconstruction, decoded, retain_graph=True)
    weight = strength * norms(towards_picture) / (norms(towards_real) + 1e-12)
    pushed = (decoded * (weight * towards_real)).sum()
    return pushed - pushed.detach(), loss


def norms(gradient: Tensor) -> Tensor:
    """Norms [B, 1, 1, 1] of what each picture of a batch gets."""
    return gradient.flatten(1).norm(dim=1)[:, None, None, None]
