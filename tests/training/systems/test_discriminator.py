"""The discriminator of picture patches: whom its losses reach, and how strongly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from far_training.systems.discriminator import PatchDiscriminator, adversarial_losses


@pytest.fixture()
def discriminator() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(8)


def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(2, 3, 16, 16).requires_grad_(), torch.rand(2, 3, 16, 16)


def test_a_patch_is_of_34_pixels(discriminator: PatchDiscriminator) -> None:
    picture = torch.rand(1, 3, 64, 64, requires_grad=True)
    convolutions = torch.nn.Sequential(*(layer for layer in discriminator.layers if not hasattr(layer, "num_groups")))
    convolutions(picture)[0, 0, 7, 7].backward()
    touched = picture.grad.abs().sum((0, 1))  # type: ignore[union-attr]
    assert (touched.sum(0) > 0).sum() == (touched.sum(1) > 0).sum() == 34


def test_the_decoder_is_pushed_by_a_part_of_the_reconstruction(discriminator: PatchDiscriminator) -> None:
    decoded, pictures = pair()
    reconstruction = (decoded - pictures).abs().mean()
    pushed, _ = adversarial_losses(discriminator, decoded, pictures, reconstruction, torch.tensor(0.3))
    (push,) = torch.autograd.grad(pushed, decoded, retain_graph=True)
    (pull,) = torch.autograd.grad(reconstruction, decoded)
    torch.testing.assert_close(push.flatten(1).norm(dim=1), 0.3 * pull.flatten(1).norm(dim=1))
    assert pushed == 0
    before = discriminator(decoded).mean()
    assert discriminator(decoded - 0.1 * push / push.norm()).mean() > before  # towards what looks real


def test_the_discriminator_alone_learns_from_its_loss(discriminator: PatchDiscriminator) -> None:
    decoded, pictures = pair()
    reconstruction = (decoded - pictures).abs().mean()
    pushed, loss = adversarial_losses(discriminator, decoded, pictures, reconstruction, torch.tensor(1.0))
    loss.backward(retain_graph=True)
    assert decoded.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    discriminator.zero_grad(set_to_none=True)
    pushed.backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_it_learns_to_tell_noise_from_pictures(discriminator: PatchDiscriminator) -> None:
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    torch.manual_seed(2)
    losses = []
    for _ in range(60):
        smooth = torch.rand(4, 3, 1, 1).expand(4, 3, 16, 16)
        noisy = torch.rand(4, 3, 16, 16, requires_grad=True)
        _, loss = adversarial_losses(discriminator, noisy, smooth, noisy.mean(), torch.tensor(1.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.8 and losses[-1] < 0.2
