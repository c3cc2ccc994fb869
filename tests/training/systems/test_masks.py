"""Frequency-aware masks, levels and EMA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from far_training.loop.ema import EMA
from far_training.systems.masks import levels_of, masked_count, visible_indices


def test_paper_ratio_falls_from_seven_tenths_to_nothing() -> None:
    counts = [masked_count("paper", level, 16, 256, np.random.default_rng(0)) for level in range(16)]
    assert counts[0] == math.ceil(0.7 * 256)
    assert counts[15] == 0
    assert counts == sorted(counts, reverse=True)
    assert counts[5] == math.ceil(256 * 0.7 * (1 - 5 / 15))


def test_code_ratio_is_a_truncated_normal_whose_minimum_rises() -> None:
    from scipy.stats import truncnorm

    rng = np.random.default_rng(0)
    for level in (0, 8, 15):
        least = 0.7 * level / 16
        ratios = np.array([masked_count("code", level, 16, 10000, rng) for _ in range(2000)]) / 10000
        assert ratios.min() >= least
        assert ratios.max() <= 1
        expected = truncnorm((least - 1) / 0.25, 0, loc=1, scale=0.25)
        assert ratios.mean() == pytest.approx(expected.mean(), abs=4 * expected.std() / math.sqrt(2000))
        assert ratios.std() == pytest.approx(expected.std(), rel=0.1)


def test_unknown_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="paper"):
        masked_count("sideways", 0, 16, 256, np.random.default_rng(0))


def test_visible_indices_rise_and_differ_between_samples() -> None:
    visible = visible_indices(torch.rand(8, 64), 20)
    assert visible.shape == (8, 20)
    assert (visible.diff(dim=1) > 0).all()
    assert len({tuple(row.tolist()) for row in visible}) == 8
    assert visible_indices(torch.rand(2, 64), 0).shape == (2, 0)
    assert (visible_indices(torch.rand(2, 64), 64) == torch.arange(64)).all()


def test_levels_per_sample_or_per_batch() -> None:
    assert len(set(levels_of(torch.rand(64), 8, 0.0).tolist())) > 4
    assert len(set(levels_of(torch.full((64,), 0.3), 8, 0.0).tolist())) == 1
    assert levels_of(torch.tensor([0.0, 0.1249, 0.1251, 0.9999]), 8, 0.0).tolist() == [0, 0, 1, 7]


def test_low_draws_low_levels_more_often() -> None:
    counts = np.bincount(levels_of(torch.rand(40000), 8, 1.0).numpy(), minlength=8)
    assert counts[0] / counts[7] == pytest.approx(2.0, rel=0.1)
    even = np.bincount(levels_of(torch.rand(40000), 8, 0.0).numpy(), minlength=8)
    assert even.min() / even.max() > 0.9


def test_ema_follows_its_formula() -> None:
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, 0.9, ramped=False)
    before = ema.model.weight.clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model, step=0)
    torch.testing.assert_close(ema.model.weight, 0.9 * before + 0.1 * model.weight)


def test_ramped_ema_starts_fast_and_ends_at_its_decay() -> None:
    ema = EMA(torch.nn.Linear(3, 2), 0.999)
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(90) == pytest.approx(0.91)
    assert ema.decay_at(10**6) == 0.999
    with pytest.raises(ValueError, match="decay"):
        EMA(torch.nn.Linear(3, 2), 1.0)
