"""Noise depends on seed, purpose, step and draw, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from far_runtime.errors import FarError
from far_runtime.sampling.noise import DIFFUSION, GUMBEL, ORDER, START, SeedNoise, gumbel, normal, raw_bits

PINNED_WORDS = ["0x2f4ba6408e4d89b", "0x3dd62b0b9ca8c5b2"]
PINNED_NORMAL = [0.1689964, 1.9383498, 0.4360356, -0.7065403]

seeds = st.integers(0, 2**64 - 1)
places = st.tuples(seeds, st.sampled_from([START, DIFFUSION, ORDER, GUMBEL]), st.integers(0, 20), st.integers(0, 1000))


@given(places, st.integers(1, 200))
def test_the_same_place_gives_the_same_draw(place: tuple[int, int, int, int], count: int) -> None:
    assert np.array_equal(normal(*place, count), normal(*place, count))


@given(places, places)
def test_different_places_give_different_draws(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> None:
    drawn = [raw_bits(*place, 8) for place in (a, b)]
    assert np.array_equal(*drawn) == (a == b)


@given(seeds, st.integers(0, 20), st.integers(0, 1000))
def test_neighbouring_counters_do_not_overlap(seed: int, step: int, draw: int) -> None:
    """A draw takes far fewer blocks than lie between two counters, so no word of one comes back in the next."""
    words = [raw_bits(seed, DIFFUSION, *at, 4096) for at in ((step, draw), (step, draw + 1), (step + 1, draw))]
    assert len(set(np.concatenate(words).tolist())) == 3 * 4096


@given(places)
def test_draws_are_standard_normal(place: tuple[int, int, int, int]) -> None:
    drawn = normal(*place, 20000).astype(np.float64)
    moments = [drawn.mean(), drawn.var() - 1, (drawn**3).mean(), (drawn**4).mean() - 3]
    # Six standard errors of each moment for 20000 independent normal numbers.
    limits = [6 * deviation / np.sqrt(20000) for deviation in (1, np.sqrt(2), np.sqrt(15), np.sqrt(96))]
    assert all(abs(moment) < limit for moment, limit in zip(moments, limits, strict=True))
    assert abs(np.corrcoef(drawn[:10000], drawn[10000:])[0, 1]) < 0.06


def test_draws_stay_what_they_were() -> None:
    """Published pictures depend on these numbers."""
    assert [hex(word) for word in raw_bits(0, START, 0, 0, 2).tolist()] == PINNED_WORDS
    assert np.allclose(normal(7, DIFFUSION, 3, 5, 4), PINNED_NORMAL, rtol=0, atol=1e-6)
    np.testing.assert_allclose(gumbel(7, 2, 4), [-1.2584528, 0.39128092, 1.2497934, 0.36611116], rtol=1e-6)
    assert SeedNoise([7]).orders(8)[0].tolist() == [6, 7, 4, 0, 1, 5, 3, 2]


@given(st.lists(seeds, min_size=1, max_size=5), st.integers(0, 12), st.integers(0, 100))
def test_a_row_of_a_batch_is_the_picture_alone(batch: list[int], step: int, draw: int) -> None:
    noise = SeedNoise(batch)
    for row, seed in enumerate(batch):
        alone = SeedNoise([seed])
        assert np.array_equal(noise.start(step, 4, 3)[row], alone.start(step, 4, 3)[0])
        assert np.array_equal(noise.diffusion(step, draw, 4, 3)[row], alone.diffusion(step, draw, 4, 3)[0])
        assert np.array_equal(noise.orders(16)[row], alone.orders(16)[0])
        assert np.array_equal(noise.gumbel(step, 4, 9)[row], alone.gumbel(step, 4, 9)[0])


@given(seeds, st.integers(0, 20))
def test_gumbel_noise_has_its_distribution(seed: int, step: int) -> None:
    drawn = gumbel(seed, step, 20000).astype(np.float64)
    assert np.isfinite(drawn).all()
    # Six standard errors of mean, variance (kurtosis 5.4) and the share below 0, which is 1 / e.
    assert abs(drawn.mean() - np.euler_gamma) < 6 * np.pi / np.sqrt(6 * 20000)
    assert abs(drawn.var() - np.pi**2 / 6) < 6 * np.pi**2 / 6 * np.sqrt(4.4 / 20000)
    assert abs((drawn < 0).mean() - np.exp(-1)) < 6 * np.sqrt(0.25 / 20000)


def test_the_largest_of_logits_and_gumbel_noise_is_a_draw_from_them() -> None:
    logits = np.log([0.1, 0.2, 0.7])
    drawn = (logits + SeedNoise([5]).gumbel(2, 20000, 3)[0]).argmax(-1)
    shares = np.bincount(drawn, minlength=3) / 20000
    assert np.abs(shares - [0.1, 0.2, 0.7]).max() < 6 * np.sqrt(0.25 / 20000)


@given(seeds)
def test_orders_are_permutations(seed: int) -> None:
    assert sorted(SeedNoise([seed]).orders(256)[0]) == list(range(256))


def test_orders_put_every_token_everywhere() -> None:
    first = SeedNoise(range(2000)).orders(16)[:, 0]
    assert np.abs(np.bincount(first, minlength=16) - 125).max() < 6 * np.sqrt(125)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(FarError, match=f"seed {seed}: expected 0 to 18446744073709551615"):
        SeedNoise([0, seed])
