"""Each technique of FAR's training changes what it should and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from far_export.stages.far import TransformerStageModule
from far_models.far import FARConfig
from far_models.kl_vae import AutoencoderKL, VAEConfig
from far_runtime.errors import FarError
from far_runtime.sampling.lowpass import lowpass_matrices
from far_training.data.latents import LatentSet
from far_training.loop.optimization import parameter_groups
from far_training.loop.randomness import SampleRng
from far_training.loop.settings import LoopSettings
from far_training.loop.task import Task
from far_training.systems.far import FARLosses, far_task
from far_training.systems.settings import AdversarialSettings, FARLossSettings, VAELossSettings
from far_training.systems.vae import VAELosses

CONFIG = FARConfig(
    grid=4, channels=3, classes=5, buffer=2, encoder_width=16, encoder_depth=1, encoder_heads=2, decoder_width=16,
    decoder_depth=1, decoder_heads=2, head_width=16, head_depth=1, latent_scale=2.0,
)  # fmt: skip
PLAIN = FARLossSettings(weight_levels=False, label_drop=0.0, draws=1, flip=0.0, dropout=0.0)


def make(settings: FARLossSettings, config: FARConfig = CONFIG) -> Task:
    """A task on eight random latents."""
    torch.manual_seed(1)
    mean = torch.randn(8, 2, 3, 4, 4)

    def moments(rows: np.ndarray, flip: np.ndarray) -> tuple[Tensor, Tensor]:
        return mean[rows, flip.astype(np.int64)], torch.full((len(rows), 3, 4, 4), -30.0)

    labels = np.arange(8) % 5
    names = tuple("abcde")
    data = LatentSet(Path("latents"), 3, 4, 2.0, labels, names, np.arange(8), moments)
    config = replace(config, masked=settings.mask != "off")
    return far_task(config, settings, data, 8, 0, lambda model, step, folder: {})


def batch_of(task: Task, step: int = 0, progress: float = 0.0) -> tuple[Tensor, ...]:
    return task.fetch(SampleRng(7, step, range(8)), progress)


def target_of(task: Task, monkeypatch: pytest.MonkeyPatch, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What the network is shown and what the head learns, [B, L, C] both."""
    seen: dict[str, Tensor] = {}
    assert isinstance(task.losses, FARLosses)
    features, forward = task.model.features, task.losses.level.diffusion.forward

    def spy_features(latents: Tensor, *rest: Tensor) -> Tensor:
        seen["shown"] = latents
        return features(latents, *rest)

    def spy_loss(head: object, target: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        seen["target"] = target
        return forward(head, target, *rest)

    monkeypatch.setattr(task.model, "features", spy_features)
    monkeypatch.setattr(task.losses.level.diffusion, "forward", spy_loss)
    task.losses(*batch)
    return seen["shown"], seen["target"]


def filtered(latents: Tensor, levels: Tensor, filter_name: str = "spatial") -> Tensor:
    matrices = torch.tensor(lowpass_matrices(4, filter_name))
    rows = [matrices[level] @ x @ matrices[level].T for x, level in zip(latents, levels.tolist(), strict=True)]
    return torch.stack(rows).flatten(2).transpose(1, 2)


def test_simplified_target_is_the_full_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(replace(PLAIN, per_sample=True))
    batch = batch_of(task)
    inputs, target = target_of(task, monkeypatch, batch)
    torch.testing.assert_close(inputs, filtered(batch[0], batch[3]))
    torch.testing.assert_close(target.squeeze(2), batch[0].flatten(2).transpose(1, 2))


def test_plain_target_is_the_next_level(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(replace(PLAIN, per_sample=True, simplify=False))
    batch = batch_of(task)
    _, target = target_of(task, monkeypatch, batch)
    torch.testing.assert_close(target.squeeze(2), filtered(batch[0], batch[3] + 1))


@pytest.mark.parametrize("mirrored", [0.0, 1.0])
def test_the_first_level_draws_the_mean_of_any_picture_of_the_class(mirrored: float) -> None:
    task = make(replace(PLAIN, per_sample=True, first="mean", flip=mirrored))
    plain = make(replace(PLAIN, per_sample=True, flip=mirrored))
    latents, noisy, labels, levels = batch_of(task)[:4]
    usual = batch_of(plain)
    assert torch.equal(noisy, usual[1]) and torch.equal(labels, usual[2]) and torch.equal(levels, usual[3])
    torch.manual_seed(1)
    means = 2.0 * torch.randn(8, 2, 3, 4, 4)[:, int(mirrored)].mean((2, 3))  # what `make` draws
    first = levels == 0
    assert first.any() and not first.all()
    assert torch.equal(latents[~first], usual[0][~first])
    for row, label in zip(latents[first], labels[first].tolist(), strict=True):
        cells = row.flatten(1).T
        members = torch.tensor([i for i in range(8) if i % 5 == label])
        nearest = torch.cdist(cells, means[members])
        assert nearest.min(1).values.max() < 1e-5
        if len(members) > 1:  # sixteen cells, two pictures
            assert len(nearest.argmin(1).unique()) == len(members)


def test_the_first_level_alone_draws_means() -> None:
    with pytest.raises(FarError, match="first mean: without simplification"):
        FARLossSettings(first="mean", simplify=False)


def test_a_batch_at_the_first_level_takes_a_level_for_all() -> None:
    task = make(replace(PLAIN, first="mean"))
    latents, levels = next((b[0], b[3]) for step in range(99) if not (b := batch_of(task, step))[3].any())
    assert levels.tolist() == [0] * 8
    assert all(len(row.flatten(1).T.unique(dim=0)) <= 2 for row in latents)


@pytest.mark.parametrize("per_sample", [True, False])
def test_a_share_learns_the_first_level_beside(per_sample: bool) -> None:
    usual, more, all_of_it = (
        make(replace(PLAIN, per_sample=per_sample, first_share=share)) for share in (0.0, 0.5, 1.0)
    )
    steps = range(60)
    before = torch.stack([batch_of(usual, step)[3] for step in steps])
    after = torch.stack([batch_of(more, step)[3] for step in steps])
    kept = after == before
    assert ((after == 0) | kept).all()
    assert 0.45 < float((after == 0).float().mean()) < 0.8  # half, and a quarter of the others
    assert all((batch_of(all_of_it, step)[3] == 0).all() for step in range(5))
    if not per_sample:
        assert (after == after[:, :1]).all()


def test_input_noise_disturbs_the_input_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(replace(PLAIN, input_noise=0.5, per_sample=True))
    batch = batch_of(task)
    inputs, target = target_of(task, monkeypatch, batch)
    clean = filtered(batch[0], batch[3])
    changed = (inputs - clean).flatten(1).abs().max(1).values > 1e-6
    assert (changed == (batch[3] > 0)).all()
    torch.testing.assert_close(target.squeeze(2), batch[0].flatten(2).transpose(1, 2))


def test_fourier_filter_is_what_training_and_drawing_see(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(replace(PLAIN, per_sample=True), replace(CONFIG, filter="fourier"))
    batch = batch_of(task)
    inputs, _ = target_of(task, monkeypatch, batch)
    torch.testing.assert_close(inputs, filtered(batch[0], batch[3], "fourier"))
    graph = TransformerStageModule(task.model)  # type: ignore[arg-type]
    torch.testing.assert_close(graph.lowpass, torch.tensor(lowpass_matrices(4, "fourier")))


def test_level_weight_scales_the_loss() -> None:
    losses = {}
    for weighted in (False, True):
        task = make(replace(PLAIN, weight_levels=weighted))
        batch = batch_of(task)
        losses[weighted] = task.losses(*batch)
    level = int(batch[3][0])
    factor = 1 + np.sin(np.pi / 2 * (level + 1) / 4)
    assert losses[True]["loss"].item() == pytest.approx(factor * losses[False]["loss"].item(), rel=1e-5)
    assert torch.equal(losses[True]["error"], losses[False]["error"])


def test_label_drop_gives_the_null_class() -> None:
    assert (batch_of(make(replace(PLAIN, label_drop=1.0)))[2] == CONFIG.classes).all()
    assert (batch_of(make(PLAIN))[2] < CONFIG.classes).all()


def test_flip_takes_the_mirrored_moments() -> None:
    plain, mirrored = (batch_of(make(replace(PLAIN, flip=share)))[0] for share in (0.0, 1.0))
    assert not torch.allclose(plain, mirrored)


def test_flip_ends_where_it_is_told_to() -> None:
    always, never, until = (
        make(replace(PLAIN, flip=flip, flip_until=end)) for flip, end in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.5))
    )
    assert torch.equal(batch_of(until, progress=0.4)[0], batch_of(always)[0])
    assert torch.equal(batch_of(until, progress=0.5)[0], batch_of(never)[0])


def test_latents_are_scaled() -> None:
    once, twice = (batch_of(make(PLAIN, replace(CONFIG, latent_scale=scale)))[0] for scale in (1.0, 2.0))
    torch.testing.assert_close(2 * once, twice)


def test_masks_hide_tokens_and_the_decoder_gets_all() -> None:
    task = make(replace(PLAIN, mask="paper"))
    counts = {}
    for step in range(20):
        batch = batch_of(task, step)
        counts[int(batch[3][0])] = batch[4].shape[1]
        assert torch.isfinite(task.losses(*batch)["loss"])
    assert counts[0] == 16 - 12
    assert counts[3] == 16


def test_draws_repeat_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(replace(PLAIN, draws=3))
    _, target = target_of(task, monkeypatch, batch_of(task))
    assert target.shape == (8, 16, 3, 3)


def test_dropout_makes_the_network_noisy() -> None:
    assert make(replace(PLAIN, dropout=0.5)).model.encoder_blocks[0].mlp.dropout == 0.5
    with pytest.raises(FarError, match="use levels batch"):
        replace(PLAIN, mask="paper", per_sample=True)


def vae_losses(
    settings: VAELossSettings, level: int, redrawn: tuple[Tensor, ...] = ()
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Losses of one batch, and what the decoder was given."""
    torch.manual_seed(0)
    model = AutoencoderKL(VAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=4))
    losses = VAELosses(model, settings, 4, AdversarialSettings())
    decoder_inputs: list[Tensor] = []
    losses.model.post_quant_conv.register_forward_hook(lambda module, inputs, output: decoder_inputs.append(inputs[0]))
    values = losses(
        torch.rand(2, 3, 8, 8) * 2 - 1,
        torch.zeros(2, 4, 4, 4),
        torch.rand(2, 1, 1, 1) * torch.randn(2, 4, 4, 4),
        torch.tensor(level),
        torch.tensor(0.0),
        *redrawn,
    )
    return values, decoder_inputs


def test_vae_loss_is_the_weighted_sum() -> None:
    settings = VAELossSettings(square=0.3, gradient=0.7, kl=0.01)
    values, _ = vae_losses(settings, 4)
    expected = values["l1"] + 0.3 * values["square"] + 0.7 * values["gradient_l1"] + 0.01 * values["kl"]
    torch.testing.assert_close(values["loss"], expected)


def test_vae_lowpass_filters_what_is_decoded() -> None:
    _, whole = vae_losses(VAELossSettings(), 4)
    _, low = vae_losses(VAELossSettings(), 2)
    matrix = torch.tensor(lowpass_matrices(4)[2])
    torch.testing.assert_close(low[0], matrix @ whole[0] @ matrix.T)


def test_latent_noise_disturbs_what_is_decoded() -> None:
    _, clean = vae_losses(VAELossSettings(), 4)
    _, noisy = vae_losses(VAELossSettings(latent_noise=0.5), 4)
    change = (noisy[0] - clean[0]).std()
    assert 0 < change < 0.5 * clean[0].std()


def test_redrawn_latents_take_the_place_of_encoded_ones() -> None:
    redrawn = torch.full((2, 4, 4, 4), 3.0)
    _, plain = vae_losses(VAELossSettings(), 4)
    _, mixed = vae_losses(VAELossSettings(), 4, (redrawn, torch.tensor([False, True])))
    assert torch.equal(mixed[0][0], plain[0][0])
    assert torch.equal(mixed[0][1], redrawn[1])


def test_decay_spares_vectors_and_the_head() -> None:
    task = make(PLAIN)
    decayed, spared = parameter_groups(task.model, 0.02, task.no_decay)
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    assert decayed["weight_decay"] == 0.02 and spared["weight_decay"] == 0
    assert all("diffloss" not in names[id(p)] and p.ndim > 1 for p in decayed["params"])
    assert any("diffloss" in names[id(p)] and p.ndim > 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_weight_decay_may_change() -> None:
    loop = LoopSettings(Path("run"), steps=100, weight_decay=0.05)
    assert loop.decay(50, 0) == 0.05
    rising = replace(loop, weight_decay_end=0.09)
    assert [rising.decay(step, 0) for step in (0, 50, 100)] == pytest.approx([0.05, 0.07, 0.09])


def test_rate_warms_up_then_stays_or_falls() -> None:
    constant = LoopSettings(Path("run"), steps=100, lr=1.0, warmup=10)
    assert constant.learning_rate(0, 0) == pytest.approx(0.1)
    assert constant.learning_rate(50, 0) == constant.learning_rate(99, 0) == 1.0
    cosine = replace(constant, schedule="cosine")
    assert cosine.learning_rate(50, 0) == pytest.approx(0.5)
    assert cosine.learning_rate(100, 0) == pytest.approx(0.0)
    linear = replace(constant, schedule="linear", lr_end=0.1)
    assert linear.learning_rate(14, 0) == pytest.approx(1.0)  # held for a twentieth of what follows the warm-up
    assert linear.learning_rate(57, 0) == pytest.approx(0.1 + 0.9 * (1 - 0.57) / (1 - 0.145))
    assert linear.learning_rate(100, 0) == pytest.approx(0.1)
    timed = replace(cosine, steps=None, minutes=2.0)
    assert timed.learning_rate(50, 60) == pytest.approx(0.5)
    assert timed.progress(5, 120) == 1.0
