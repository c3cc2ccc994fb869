"""What is remembered, within its bounds."""

from __future__ import annotations

import numpy as np

from far_runtime.conditioning.cache import LruArrays


def test_an_array_is_made_once_and_the_longest_unused_is_given_up() -> None:
    memo, made = LruArrays(8), []
    for key in ("a", "b", "a", "c", "a", "b"):
        memo.get(key, lambda key=key: made.append(key) or np.zeros(1, np.float32))  # type: ignore[func-returns-value, misc]
    assert made == ["a", "b", "c", "b"]
    assert (len(memo), memo.size) == (2, 8)


def test_what_is_not_finite_is_made_again() -> None:
    memo = LruArrays(1024)
    for value in (np.inf, np.nan):
        assert not np.isfinite(memo.get("a", lambda value=value: np.full(3, value, np.float32))).any()  # type: ignore[misc]
    assert memo.get("a", lambda: np.ones(3, np.float32)).sum() == 3
    assert memo.get("a", lambda: np.zeros(3, np.float32)).sum() == 3
