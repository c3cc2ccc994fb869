"""Comparisons: figures on arrays whose differences are known, and sums that equal those of all calls together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from far_export.compare import ErrorStatistics, compare, psnr

floats = arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32))


def test_figures_of_a_known_difference() -> None:
    comparison = compare(np.array([3.0, 4.5]), np.array([3.0, 4.0]))
    assert comparison.error == pytest.approx(0.1)
    assert comparison.max_abs == pytest.approx(0.5)
    assert comparison.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))


def test_a_small_result_of_large_terms_is_judged_by_the_terms() -> None:
    assert compare(np.array([1.1]), np.array([1.0]), smallest_scale=100.0).error == pytest.approx(1e-3)
    assert compare(np.array([1.1]), np.array([1.0]), smallest_scale=0.1).error == pytest.approx(0.1)


def test_zeros() -> None:
    zeros = np.zeros(3)
    assert compare(zeros, zeros).error == 0 and compare(zeros, zeros).cosine == 1
    assert compare(np.ones(3), zeros).error == math.inf and compare(np.ones(3), zeros).cosine == 0


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nothing_that_is_not_finite_is_close(side: int, value: float) -> None:
    both = [np.ones(5, np.float32), np.ones(5, np.float32)]
    both[side][2] = value
    comparison = compare(*both)
    assert comparison.error == math.inf
    assert (comparison.nonfinite, comparison.nonfinite_reference) == ((1, 0) if side == 0 else (0, 1))
    assert comparison.max_abs == 0  # of the four that can be compared


def test_equal_infinities_are_no_agreement() -> None:
    both = np.array([np.inf, 1.0])
    assert compare(both, both.copy()).error == math.inf


def test_other_shapes_differ() -> None:
    assert compare(np.zeros(3), np.zeros(4)).error == math.inf


def test_one_grey_value_in_a_black_picture_counts_as_in_a_grey_one() -> None:
    for shade in (0, 128):
        picture = np.full((8, 8, 3), shade, np.uint8)
        other = picture.copy()
        other[0, 0, 0] += 1
        assert compare(other, picture).error == pytest.approx(1 / (128 * math.sqrt(192)))


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=4))
def test_sums_over_calls_equal_one_call_with_everything(calls: list[tuple[np.ndarray, np.ndarray]]) -> None:
    statistics = ErrorStatistics()
    for got, expected in calls:
        statistics.add(compare(got, expected))
    whole = compare(np.stack([got for got, _ in calls]), np.stack([expected for _, expected in calls]))
    assert statistics.relative_error == pytest.approx(whole.error, rel=1e-9)
    assert statistics.max_abs == whole.max_abs
    assert statistics.calls == len(calls)
    errors = [compare(*call).error for call in calls]
    assert statistics.error == max(errors)
    assert errors[statistics.worst_call] == statistics.error


def test_first_call_that_is_not_finite_is_remembered() -> None:
    statistics = ErrorStatistics()
    for value in (1.0, np.nan, 1.0, np.inf):
        statistics.add(compare(np.array([value]), np.array([1.0])))
    assert (statistics.first_nonfinite, statistics.nonfinite, statistics.relative_error) == (1, 2, math.inf)
    assert statistics.first_nonfinite_reference is None
    statistics.add(compare(np.array([1.0]), np.array([np.nan])))
    assert (statistics.first_nonfinite, statistics.first_nonfinite_reference) == (1, 4)


def test_psnr() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    assert psnr(picture, picture) == math.inf
    assert psnr(picture + np.uint8(255), picture) == pytest.approx(0)
    assert psnr(picture + np.uint8(1), picture) == pytest.approx(48.13, abs=0.01)
    assert psnr(picture, picture + np.uint8(200)) == psnr(picture + np.uint8(200), picture)  # no wrap-around
