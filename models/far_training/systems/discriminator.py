"""A discriminator of picture patches, against which a decoder learns to draw crisp pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE, GROUPS = 0.2, 8
SMALLEST_SIDE = 12
"""Side in pixels of the smallest picture that gives a score."""


class PatchDiscriminator(nn.Module):
    """Scores how real overlapping patches of pictures look.

    It is pix2pix's discriminator with two changes. It has two strided convolutions in place of four, so that a patch
    has a side of 34 pixels, for pictures of 64. And it has group norm in place of batch norm, so that a score depends
    on one picture alone.
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
        """Scores [B, 1, h, w] of pictures [B, 3, S, S]."""
        scores: Tensor = self.layers(pictures)
        return scores


def adversarial_losses(
    discriminator: PatchDiscriminator, decoded: Tensor, pictures: Tensor, reconstruction: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """The decoder's and the discriminator's loss [] (hinge) for decoded and real pictures [B, 3, S, S].

    The decoder's loss has the value 0. Its gradient is that of the mean score, times `strength` and each picture's
    ratio of the two gradients' norms.

    reconstruction: the loss [] between the pictures, computed from `decoded`.
    strength: [], see AdversarialSettings.
    """
    # The clone is no leaf: PyTorch's FLOP counter cannot follow a gradient to a leaf.
    seen = decoded.detach().requires_grad_().clone()
    fake = discriminator(seen)
    loss = 0.5 * (F.relu(1 + fake).mean() + F.relu(1 - discriminator(pictures)).mean())
    if not decoded.requires_grad:
        return torch.zeros_like(loss), loss
    (towards_real,) = torch.autograd.grad(-fake.mean(), seen, retain_graph=True)
    (towards_picture,) = torch.autograd.grad(reconstruction, decoded, retain_graph=True)
    weight = strength * norms(towards_picture) / (norms(towards_real) + 1e-12)
    product = (decoded * (weight * towards_real)).sum()
    return product - product.detach(), loss


def norms(gradient: Tensor) -> Tensor:
    """Norm [B, 1, 1, 1] of the gradient [B, 3, S, S] at each picture."""
    return gradient.flatten(1).norm(dim=1)[:, None, None, None]
