"""The low-pass matrices do what torch's area and bicubic interpolation do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from far_runtime.frequency import lowpass, lowpass_matrices


@pytest.mark.parametrize("grid", [4, 8, 16, 15])
def test_against_interpolate(grid: int) -> None:
    x = torch.randn(2, 3, grid, grid, dtype=torch.float64)
    matrices = torch.from_numpy(lowpass_matrices(grid).copy()).double()
    for level in range(1, grid):
        small = functional.interpolate(x, size=(level, level), mode="area")
        wanted = functional.interpolate(small, size=(grid, grid), mode="bicubic")
        torch.testing.assert_close(matrices[level] @ x @ matrices[level].T, wanted, rtol=1e-5, atol=1e-6)


def test_first_level_is_nothing_and_the_last_everything() -> None:
    matrices = lowpass_matrices(8)
    assert not matrices[0].any()
    np.testing.assert_array_equal(matrices[8], np.eye(8))


def test_tokens_are_filtered_like_cells() -> None:
    tokens = np.random.default_rng(0).standard_normal((2, 64, 3)).astype(np.float32)
    matrix = lowpass_matrices(8)[3]
    cells = tokens.reshape(2, 8, 8, 3).transpose(0, 3, 1, 2)
    wanted = (matrix @ cells @ matrix.T).transpose(0, 2, 3, 1).reshape(2, 64, 3)
    np.testing.assert_allclose(lowpass(tokens, 3), wanted, rtol=1e-4, atol=1e-6)


def test_matrices_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        lowpass_matrices(8)[0] += 1
