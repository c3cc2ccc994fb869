"""Schedules against the numbers of the official code and the paper."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from far_runtime.errors import FarError
from far_runtime.sampling.far import plan_of, resolve_settings, visible_tokens
from far_runtime.sampling.noise_schedule import cosine_alphas_cumprod, posterior, respaced_timesteps
from far_runtime.sampling.schedule import (
    Schedule,
    check_levels,
    make_schedule,
    official_levels,
    parse_levels,
    parse_steps,
)
from far_runtime.sampling.solvers import Diffusion
from model_infos import far_info

MASKED = official_levels(16, masked=True)
UNMASKED = official_levels(16, masked=False)
FAR, MASKED_FAR = far_info(16), far_info(16, masked=True)


def temperatures(schedule: Schedule) -> list[float]:
    return [step.temperature for step in schedule.diffusion]


def test_official_levels() -> None:
    assert UNMASKED == (0, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert MASKED == (0, 12, 12, 4, 5, 6, 7, 8, 9, 10, 11)
    assert official_levels(8, masked=False) == tuple(range(8))


def test_official_unmasked_schedule() -> None:
    schedule = make_schedule(resolve_settings(FAR, {}), masked=False)
    assert [step.steps for step in schedule.diffusion] == [100] * 10
    assert {step.solver for step in schedule.diffusion} == {"ddpm"}
    assert schedule.guidance == pytest.approx([1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8])
    cosines = [
        0.98768834,
        0.95105652,
        0.89100652,
        0.80901699,
        0.70710678,
        0.58778525,
        0.4539905,
        0.30901699,
        0.15643447,
        0,
    ]
    assert temperatures(schedule) == pytest.approx([0.8 + 0.2 * (1 - cosine) for cosine in cosines])
    steps = plan_of(FAR, schedule)
    assert [step.constants["lowpass"] for step in steps] == list(UNMASKED)
    assert {step.constants["count"] for step in steps} == {256}


def test_official_masked_schedule() -> None:
    schedule = make_schedule(resolve_settings(MASKED_FAR, {}), masked=True)
    assert schedule.guidance == pytest.approx([1 + 2 * i / 11 for i in range(11)])
    assert temperatures(schedule) == pytest.approx([0.85 + 0.15 * i / 11 for i in range(11)])
    steps = plan_of(MASKED_FAR, schedule)
    assert [step.constants["count"] for step in steps] == [0, 3, 11, 24, 41, 63, 89, 118, 150, 184, 220]
    assert [step.constants["lowpass"] for step in steps] == [16, 16, 12, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [step.constants["level"] for step in steps] == [step.number for step in steps] == list(MASKED)


def test_frequency_aware_steps_rise_linearly_to_about_70_on_average() -> None:
    steps = parse_steps("40:100", 10)
    assert steps == (40, 47, 53, 60, 67, 73, 80, 87, 93, 100)
    assert sum(steps) == 700


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(25, 3, (25, 25, 25)), ("25", 2, (25, 25)), ("5:5", 1, (5,)), ("9,8,7", 3, (9, 8, 7)), ([1, 1000], 2, (1, 1000))],
)
def test_ways_to_write_steps(steps: object, count: int, expected: tuple[int, ...]) -> None:
    assert parse_steps(steps, count) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", ["", "many", "1:2:3", "0", "1001", "4:0", "1,2", "1.5"])
def test_other_steps_are_refused(steps: str) -> None:
    with pytest.raises(FarError, match="steps"):
        parse_steps(steps, 3)


@pytest.mark.parametrize(
    ("levels", "masked", "reason"),
    [
        ((), False, "no levels"),
        ((0, 2, 2), False, "must rise"),
        ((3, 2), False, "must rise"),
        ((0, 16), False, "level 16 is outside 0 to 15"),
        ((-1, 2), False, "level -1 is outside 0 to 15"),
        ((0, 12, 12, 4), False, "must rise"),
        ((0, 12, 12, 5, 4), True, "must rise"),
        ((0, 5, 4), True, "must rise"),
    ],
)
def test_levels_that_do_not_rise_are_refused(levels: tuple[int, ...], masked: bool, reason: str) -> None:
    with pytest.raises(FarError, match=reason):
        check_levels(levels, 16, masked)


@pytest.mark.parametrize("levels", [(0, 12, 12, 4), (0, 12, 12, 4, 5)])
def test_a_masked_list_may_open_with_its_official_levels(levels: tuple[int, ...]) -> None:
    check_levels(levels, 16, masked=True)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=12), st.booleans())
def test_levels_that_do_not_rise_come_with_a_list_that_does(levels: list[int], masked: bool) -> None:
    try:
        check_levels(levels, 16, masked)
    except FarError as error:
        advice = re.fullmatch(r"levels .*: levels must rise .*; use levels ([\d,]+), say", str(error))
        assert advice is not None
        suggested = parse_levels(advice[1])
        assert set(suggested) == set(levels)
        check_levels(suggested, 16, masked)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "much", [1], 2**2000])
@pytest.mark.parametrize("name", ["guidance", "guidance_floor", "temperature"])
def test_scales_are_checked(name: str, value: object) -> None:
    with pytest.raises(FarError, match=rf"^{name} .*: expected a number of 0 or more; use {name} \d, say"):
        resolve_settings(FAR, {name: value})


def test_levels_are_read_from_text() -> None:
    assert parse_levels("0,2,10") == parse_levels((0, 2, 10)) == [0, 2, 10]
    with pytest.raises(FarError, match="whole numbers"):
        parse_levels("0;2")
    with pytest.raises(FarError, match="whole numbers"):
        parse_levels([0.5])  # type: ignore[list-item]


def test_cosine_schedule() -> None:
    """First beta and last cumulative product of squaredcos_cap_v2 with 1000 steps."""
    alphas = cosine_alphas_cumprod()
    assert 1 - alphas[0] == pytest.approx(4.1284e-5, rel=1e-4)
    assert alphas[999] == pytest.approx(2.4288e-9, rel=1e-4)


def test_respaced_timesteps() -> None:
    assert respaced_timesteps(4).tolist() == [0, 333, 666, 999]
    hundred = respaced_timesteps(100)
    assert hundred[:6].tolist() == [0, 10, 20, 30, 40, 50]
    assert (hundred[-1], len(set(hundred.tolist()))) == (999, 100)
    assert respaced_timesteps(1000).tolist() == list(range(1000))
    with pytest.raises(ValueError, match="1001 diffusion steps"):
        respaced_timesteps(1001)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [2, 10, 100])
def test_the_table_is_the_official_update_written_out(steps: int, prediction: str) -> None:
    """p_sample of gaussian_diffusion.py with its own intermediate quantities, against state x + output o."""
    rng = np.random.default_rng(0)
    alphas = cosine_alphas_cumprod()[respaced_timesteps(steps)]
    previous = np.append(1.0, alphas[:-1])
    betas = 1 - alphas / previous
    timesteps, table = Diffusion(steps, temperature=0.9).table(prediction)
    assert timesteps.tolist() == respaced_timesteps(steps)[::-1].tolist()
    for row, i in zip(table.astype(np.float64), reversed(range(steps)), strict=True):
        x, output = rng.standard_normal(2)
        if prediction == "epsilon":
            x0 = (x - np.sqrt(1 - alphas[i]) * output) / np.sqrt(alphas[i])
        else:
            x0 = np.sqrt(alphas[i]) * x - np.sqrt(1 - alphas[i]) * output
        mean = (np.sqrt(previous[i]) * betas[i] * x0 + np.sqrt(1 - betas[i]) * (1 - previous[i]) * x) / (1 - alphas[i])
        assert row[0] * x + row[1] * output == pytest.approx(mean, rel=1e-5, abs=1e-6)
        variance = betas[max(i, 1)] * (1 - previous[max(i, 1)]) / (1 - alphas[max(i, 1)])
        assert row[2:5].tolist() == pytest.approx([np.log(betas[i]), np.log(variance), 0.9 if i else 0.0], rel=1e-5)


def test_posterior_variance_of_the_first_step_is_the_second_ones() -> None:
    constants = posterior(respaced_timesteps(50))
    assert constants.log_variance[0] == constants.log_variance[1]
    assert np.isfinite(constants.log_variance).all()


def test_visible_tokens_are_the_last_of_the_order() -> None:
    orders = np.array([[3, 0, 2, 1], [1, 2, 3, 0]])
    visible, restore = visible_tokens(orders, 2)
    assert visible.tolist() == [[1, 2], [0, 3]]
    assert restore.tolist() == [[2, 0, 1, 2], [0, 2, 2, 1]]
    nothing, hidden = visible_tokens(orders, 0)
    assert nothing.shape == (2, 0)
    assert (hidden == 0).all()
