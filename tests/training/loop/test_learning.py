"""Every trainer learns four pictures by heart, and what is particular to each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.far import FARConfig
from far_models.far_t2i import FART2IConfig
from far_models.pictures import PictureSet
from far_models.var import VARConfig
from far_models.var_hybrid import VARHybrid, VARHybridConfig
from far_models.vq_vae import VQVAE, VQVAEConfig
from far_training.data.latents import LatentSet
from far_training.data.mixture import PictureMixture
from far_training.data.prompts import TextSet
from far_training.data.tokens import TokenSet
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Task
from far_training.systems.far_t2i import far_t2i_task
from far_training.systems.mar import mar_task
from far_training.systems.masks import random_count, split_indices
from far_training.systems.settings import (
    FART2ILossSettings,
    MARLossSettings,
    VARHybridLossSettings,
    VARLossSettings,
    VQVAELossSettings,
)
from far_training.systems.var import var_task
from far_training.systems.var_hybrid import var_hybrid_task
from far_training.systems.vqvae import VQVAELosses, default_scales, residuals, vqvae_task

SCALES = (1, 2, 4)
SIZES: dict[str, Any] = {"grid": 4, "channels": 3, "latent_scale": 1.0, "head_width": 48, "head_depth": 2}
HALVES: dict[str, Any] = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("width", 32), ("depth", 1), ("heads", 2))
}
MAR_CONFIG = FARConfig(**SIZES, **HALVES, classes=4, buffer=2, masked=True, prediction="v")
T2I_CONFIG = FART2IConfig(**SIZES, **HALVES, context_tokens=3, context_width=6, head_dim=16, prediction="v")
VQ_CONFIG = VQVAEConfig(
    ch=8, multipliers=(1, 2), blocks=1, patch=2, channels=4, vocabulary=24, phis=2, patch_nums=SCALES
)
VAR_CONFIG = VARConfig(patch_nums=SCALES, channels=4, vocabulary=24, classes=4, width=32, depth=2, heads=2)
HYBRID_CONFIG = VARHybridConfig(
    patch_nums=SCALES, channels=3, classes=4, width=32, depth=2, heads=2, head_width=48, head_depth=2, prediction="v",
    latent_scale=1.0,
)  # fmt: skip
SURE: dict[str, Any] = {"flip": 0.0, "learned_variance": False, "draws": 8}
EVERY = np.arange(4)


def latents() -> LatentSet:
    """Four random latents, one of each class, mirrored into four others."""
    means = torch.randn(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def moments(rows: NDArray[np.int64], flip: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        return means[rows, flip.astype(np.int64)], torch.full((len(rows), 3, 4, 4), -30.0)

    return LatentSet(Path("latents"), 3, 4, 1.0, EVERY, tuple("abcd"), EVERY, moments)


def prompts() -> TextSet:
    features = np.random.default_rng(0).standard_normal((4, 3, 6)).astype(np.float32)
    return TextSet(Path("text"), "encoder", tuple("abcd"), EVERY, features)


def pictures() -> PictureSet:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)
    return PictureSet(Path("pictures"), 16, EVERY, tuple("abcd"), EVERY, EVERY[:0], lambda rows: images[rows])


def tokens() -> TokenSet:
    maps = torch.randint(24, (4, 2, 21), generator=torch.Generator().manual_seed(2))
    return TokenSet(Path("tokens"), EVERY, tuple("abcd"), EVERY, lambda rows, flip: maps[rows, flip.astype(np.int64)])


def nothing(model: torch.nn.Module, step: int, folder: Path) -> dict[str, float]:
    return {}


def awaken(model: torch.nn.Module) -> None:
    """Random values for what starts at zero and would let nothing through."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def hybrid(residual: bool) -> Task:
    settings = VARHybridLossSettings(label_drop=0.0, **SURE)
    return var_hybrid_task(replace(HYBRID_CONFIG, residual=residual), settings, latents(), 4, 0, nothing)


def vqvae() -> VQVAE:
    torch.manual_seed(5)
    return VQVAE(VQ_CONFIG).requires_grad_(False)


MAKE: dict[str, Callable[[], Task]] = {
    "vqvae": lambda: vqvae_task(VQ_CONFIG, VQVAELossSettings(restart=10), PictureMixture([pictures()], [1.0]), 4, 0),
    "mar": lambda: mar_task(
        MAR_CONFIG, MARLossSettings(mask_least=0.3, label_drop=0.0, dropout=0.0, **SURE), latents(), 4, 0, nothing
    ),
    "far_t2i": lambda: far_t2i_task(
        T2I_CONFIG, FART2ILossSettings(mask_least=0.3, text_drop=0.0, **SURE), latents(), prompts(), 4, 0, nothing
    ),
    "var": lambda: var_task(VAR_CONFIG, VARLossSettings(label_drop=0.0, flip=0.0), tokens(), vqvae(), 4, 0, nothing),
    "residual": lambda: hybrid(True),
    "plain": lambda: hybrid(False),
}
# What is watched, the share of its start that it has to fall below, and the steps that this may take.
GOALS = {
    "vqvae": ("l1", 0.7, 70),
    "mar": ("error", 0.6, 110),
    "far_t2i": ("error", 0.6, 110),
    "var": ("loss", 0.3, 60),
    "residual": ("error", 0.5, 60),
    "plain": ("error", 0.5, 60),
}


@pytest.mark.parametrize("trainer", MAKE)
def test_four_pictures_are_learned_by_heart(trainer: str) -> None:
    task, (name, share, steps) = MAKE[trainer](), GOALS[trainer]
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    seen = []
    for step in range(steps):
        values = task.losses(*batch_of(task, step, step / steps))
        values["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(values[name].item())
    assert np.mean(seen[-10:]) < share * np.mean(seen[:3]), seen[::10]


def batch_of(task: Task, step: int = 0, progress: float = 0.0) -> tuple[Tensor, ...]:
    """A whole batch of four."""
    return task.fetch(SampleRng(7, step, range(4)), progress)


def test_only_the_masked_tokens_count_in_mar() -> None:
    task = MAKE["mar"]()
    latents, noisy, labels, visible, masked, *draws = batch_of(task)
    assert 0 < visible.shape[1] < 16
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(16).expand(4, -1))
    targets: list[Tensor] = []
    forward = task.losses.diffusion.forward

    def spy(head: object, target: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        targets.append(target)
        return forward(head, target, *rest)

    task.losses.diffusion.forward = spy
    task.losses(latents, noisy, labels, visible, masked, *draws)
    expected = latents.flatten(2).transpose(1, 2).gather(1, masked.unsqueeze(-1).expand(-1, -1, 3))
    assert targets[0].shape == (4, masked.shape[1], 8, 3)
    assert torch.equal(targets[0][:, :, 0], expected)


def test_masked_share_is_a_cut_normal() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([random_count(0.7, 100, rng) for _ in range(4000)])
    assert counts.min() >= 70 and counts.max() == 100
    # |n| <= 1.2 with n standard normal: mean 0.25 E|n| = 0.1347 below 1; rounding up adds half a token.
    assert counts.mean() == pytest.approx(100 - 13.47 + 0.5, abs=0.4)
    assert random_count(1.0, 100, rng) == 100
    visible, masked = split_indices(torch.rand(3, 10), 4)
    assert (visible.diff() > 0).all() and (masked.diff() > 0).all() and visible.shape == (3, 4)


def test_a_dropped_prompt_is_the_null_condition() -> None:
    settings = FART2ILossSettings(text_drop=1.0, mask_least=1.0, **SURE)
    task = far_t2i_task(T2I_CONFIG, settings, latents(), prompts(), 4, 0, nothing)
    awaken(task.model)
    batch = batch_of(task)
    assert batch[3].all() and batch[5].shape == (4, 0)
    task.losses(*batch)["loss"].backward()
    assert task.model.fake_latent.grad.abs().sum() > 0
    assert task.model.context_embed.weight.grad.abs().sum() == 0
    assert task.model.z_proj.weight.grad is None  # nothing is visible, so that the encoder has nothing to read


def test_each_picture_has_its_prompt_and_its_level() -> None:
    text = replace(prompts(), index=EVERY[::-1].copy())
    task = far_t2i_task(T2I_CONFIG, FART2ILossSettings(text_drop=0.0), latents(), text, 4, 0, nothing)
    order = batch_of(task)
    rows = [int(np.where((text.features == f.numpy()).all((1, 2)))[0][0]) for f in order[2]]
    from far_models.pictures import visiting_order

    assert rows == [3 - row for row in visiting_order(0, 4, 4, 7)]
    levels = torch.stack([batch_of(task, step)[4] for step in range(20)])
    assert (levels.max(1).values > levels.min(1).values).any() and levels.max() == 3 and levels.min() == 0


def test_var_does_not_see_what_it_predicts() -> None:
    task = MAKE["var"]()
    labels, drawn = batch_of(task)
    other = drawn.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 24
    task.model.head.weight.data.normal_()
    before, after = task.losses(labels, drawn), task.losses(labels, other)
    assert torch.equal(before["entropy_01"], after["entropy_01"])
    assert torch.equal(before["entropy_02"], after["entropy_02"])
    assert not torch.equal(before["entropy_04"], after["entropy_04"])
    counts = torch.tensor([1.0, 4.0, 16.0])
    parts = torch.stack([before[f"entropy_{side:02d}"] for side in SCALES])
    torch.testing.assert_close((counts * parts).sum() / 21, before["loss"].detach())


def test_smoothing_of_the_targets() -> None:
    plain, smooth = (
        var_task(VAR_CONFIG, VARLossSettings(smoothing=share), tokens(), vqvae(), 4, 0, nothing) for share in (0.0, 0.5)
    )
    batch = batch_of(plain)
    plain.model.head.weight.data.normal_()
    smooth.model.load_state_dict(plain.model.state_dict())
    assert smooth.losses(*batch)["loss"] != plain.losses(*batch)["loss"]


def test_the_vqvae_of_var_stays_as_it_is() -> None:
    task = MAKE["var"]()
    assert not any(parameter.requires_grad for parameter in task.losses.quantize.parameters())
    assert not any(name.startswith("quantize") for name, _ in task.model.named_parameters())


def test_codes_out_of_use_move_to_what_is_left_to_code() -> None:
    task = vqvae_task(VQ_CONFIG, VQVAELossSettings(), PictureMixture([pictures()], [1.0]), 4, 0)
    losses = task.losses
    assert isinstance(losses, VQVAELosses)
    codes = losses.model.quantize.embedding.weight
    losses.hits[:20] = 1.0
    before = codes.detach().clone()
    features = torch.randn(2, 16, 4)
    left = torch.cat([part.flatten(0, 1) for part in residuals(losses.model.quantize, features)])
    losses.restart(features)
    assert torch.equal(codes[:20], before[:20])
    assert (codes[20:, None] == left).all(-1).any(1).all() and not torch.equal(codes[20:], before[20:])
    assert losses.used().all()


def test_hits_are_counted_over_all_scales() -> None:
    losses = MAKE["vqvae"]().losses
    assert isinstance(losses, VQVAELosses)
    losses.count(torch.tensor([[0, 0, 3], [0, 1, 3]]))
    torch.testing.assert_close(losses.hits[:4], 0.01 * torch.tensor([3.0, 1.0, 0.0, 2.0]))


def test_what_the_scales_leave_adds_up() -> None:
    model = vqvae()
    features = torch.randn(2, 16, 4)
    parts = residuals(model.quantize, features)
    torch.testing.assert_close(parts[0], features.mean(1, keepdim=True))
    states = model.quantize.states(model.quantize.encode(features))
    torch.testing.assert_close(parts[2], features - states[1])


def test_restarts_come_when_due_and_end() -> None:
    task = MAKE["vqvae"]()
    due = [bool(batch_of(task, step, step / 100)[1]) for step in range(100)]
    assert [step for step, flag in enumerate(due) if flag] == [0, 10, 20, 30, 40, 50]


def test_default_scales_end_with_the_latents_side() -> None:
    assert default_scales(16) == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert default_scales(8) == (1, 2, 3, 4, 5, 6, 8)
    assert default_scales(7) == (1, 2, 3, 4, 5, 6, 7)
    assert default_scales(32)[-3:] == (18, 24, 32)


@pytest.mark.parametrize("residual", [True, False])
def test_a_hybrid_draws_as_it_was_taught(residual: bool) -> None:
    """With the true tokens for drawn ones, every scale is conditioned as under teacher forcing, and the latents come
    back."""
    torch.manual_seed(0)
    model = VARHybrid(replace(HYBRID_CONFIG, residual=residual)).eval()
    latents = torch.randn(2, 16, 3)
    model.set_gain(latents)
    for block in model.var.blocks:  # else the class alone counts
        torch.nn.init.normal_(block.ada_lin[1].weight, std=0.3)
    labels = torch.tensor([1, 3])
    targets, inputs = model.targets_and_inputs(latents)
    assert targets.std() == pytest.approx(1, abs=0.15)
    taught = model.condition(model.var.features(labels, inputs), model.scale_numbers())
    assert not torch.allclose(taught[:, 1], taught[:, 4])

    def truth(scale: int, condition: Tensor) -> Tensor:
        start, end = model.ranges[scale]
        torch.testing.assert_close(condition, taught[:, start:end], rtol=1e-4, atol=1e-4)
        return targets[:, start:end]

    torch.testing.assert_close(model.generate(labels, truth), latents, rtol=1e-4, atol=1e-4)


def test_residual_and_plain_maps_differ_where_they_should() -> None:
    latents = torch.randn(2, 16, 3)
    maps = [
        VARHybrid(replace(HYBRID_CONFIG, residual=residual)).targets_and_inputs(latents)[0]
        for residual in (True, False)
    ]
    torch.testing.assert_close(maps[0][:, 0], latents.mean(1))
    torch.testing.assert_close(maps[1][:, 5:], latents)
    rest = latents - latents.mean(1, keepdim=True)
    torch.testing.assert_close(maps[0][:, 1:5].mean(1), rest.mean(1), atol=1e-5, rtol=0)
    assert not torch.allclose(maps[0][:, 5:], maps[1][:, 5:])


@pytest.mark.parametrize("residual", [True, False])
def test_hybrids_draw_finite_pictures_whatever_their_neighbours(residual: bool) -> None:
    from far_models.kl_vae import AutoencoderKL, VAEConfig
    from far_training.sampling import sample_hybrid

    model = hybrid(residual).model.eval().requires_grad_(False)
    assert isinstance(model, VARHybrid)
    awaken(model)
    vae = AutoencoderKL(VAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=3)).eval().requires_grad_(False)
    together = sample_hybrid(model, vae, [0, 1, 2], [5, 6, 7], steps=3, guidance=2.0)
    assert together.shape == (3, 8, 8, 3) and together.std() > 0
    alone = sample_hybrid(model, vae, [2], [7], steps=3, guidance=2.0)
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(sample_hybrid(model, vae, [2], [8], steps=3, guidance=2.0), alone)
    assert not np.array_equal(sample_hybrid(model, vae, [2], [7], steps=3), alone)
