"""Low-pass matrices against torch's area and bicubic interpolation."""

from __future__ import annotations

import numpy as np
import pytest

from far_runtime.sampling.lowpass import area_matrix, bicubic_matrix, lowpass, lowpass_matrices

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("grid", [4, 8, 16, 32])
def test_every_level_is_area_down_and_bicubic_up(grid: int) -> None:
    cells = np.random.default_rng(grid).standard_normal((2, 3, grid, grid)).astype(np.float32)
    tokens = cells.transpose(0, 2, 3, 1).reshape(2, grid * grid, 3)
    for level in range(1, grid):
        small = torch.nn.functional.interpolate(torch.from_numpy(cells), size=(level, level), mode="area")
        expected = torch.nn.functional.interpolate(small, size=(grid, grid), mode="bicubic").numpy()
        matrix = lowpass_matrices(grid)[level]
        assert np.abs(matrix @ cells @ matrix.T - expected).max() < 2e-6
        filtered = lowpass(tokens, level).reshape(2, grid, grid, 3).transpose(0, 3, 1, 2)
        assert np.abs(filtered - expected).max() < 2e-6


@pytest.mark.parametrize("grid", [8, 16])
def test_the_fourier_filter_keeps_the_lowest_frequencies(grid: int) -> None:
    cells = np.random.default_rng(grid).standard_normal((grid, grid))
    frequency = np.abs(np.fft.fftfreq(grid, 1 / grid))
    for level in range(1, grid, 2):  # an odd number of frequencies: the mean and whole pairs
        kept = frequency <= level // 2
        assert kept.sum() == level
        expected = np.fft.ifft2(np.fft.fft2(cells) * np.outer(kept, kept)).real
        matrix = lowpass_matrices(grid, "fourier")[level].astype(np.float64)
        assert np.abs(matrix @ cells @ matrix.T - expected).max() < 1e-6
    halved = lowpass_matrices(grid, "fourier")[2] @ np.cos(2 * np.pi * np.arange(grid) / grid)
    assert np.allclose(halved, 0.5 * np.cos(2 * np.pi * np.arange(grid) / grid), atol=1e-6)


def test_the_ends_are_nothing_and_everything() -> None:
    tokens = np.random.default_rng(0).standard_normal((1, 64, 2)).astype(np.float32)
    assert not lowpass(tokens, 0).any()
    assert np.array_equal(lowpass(tokens, 8), tokens)


def test_rows_of_both_matrices_sum_to_one() -> None:
    for to in range(1, 17):
        assert np.allclose(area_matrix(16, to).sum(axis=1), 1)
        assert np.allclose(bicubic_matrix(to, 16).sum(axis=1), 1)
