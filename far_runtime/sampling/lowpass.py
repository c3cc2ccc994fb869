"""Low-pass filters of FAR as constant matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CUBIC_A = -0.75
"""The parameter a of Keys' bicubic kernel, torch's."""


def area_matrix(size: int, to: int) -> NDArray[np.float64]:
    """[to, size] matrix that averages `size` samples in `to` bins, as torch's `interpolate(mode="area")` does.

    Bin i covers the samples from floor(i size / to) to ceil((i + 1) size / to), the last one excluded; two bins may
    share a sample.
    """
    matrix = np.zeros((to, size))
    for i in range(to):
        start, end = i * size // to, -((i + 1) * size // -to)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def bicubic_matrix(size: int, to: int) -> NDArray[np.float64]:
    """[to, size] matrix of bicubic resampling, as torch's `interpolate(mode="bicubic", align_corners=False)` does.

    Keys' kernel with a = CUBIC_A; samples beyond an edge repeat the edge.
    """

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (CUBIC_A + 2) * x**3 - (CUBIC_A + 3) * x**2 + 1
        if x < 2:
            return CUBIC_A * (x**3 - 5 * x**2 + 8 * x - 4)
        return 0.0

    matrix = np.zeros((to, size))
    for i in range(to):
        centre = (i + 0.5) * size / to - 0.5
        first = int(np.floor(centre))
        for j in range(first - 1, first + 3):
            matrix[i, min(max(j, 0), size - 1)] += kernel(centre - j)
    return matrix


def fourier_matrix(size: int, level: int) -> NDArray[np.float64]:
    """[size, size] matrix that keeps the `level` lowest frequencies of `size` samples and drops the others.

    An ideal filter in the Fourier domain: it keeps the mean, then the pairs +-1, +-2, ..., and for an even level half
    of the last pair.
    """
    frequency = np.abs(np.fft.fftfreq(size, 1 / size))
    gain = np.where(frequency < level / 2, 1.0, np.where(frequency == level / 2, 0.5, 0.0))
    matrix: NDArray[np.float64] = np.fft.ifft(gain[:, None] * np.fft.fft(np.eye(size), axis=0), axis=0).real
    return matrix


FILTERS: dict[str, Callable[[int, int], NDArray[np.float64]]] = {
    "spatial": lambda grid, level: bicubic_matrix(level, grid) @ area_matrix(grid, level),
    "fourier": fourier_matrix,
}
"""FAR's two low-pass filters (section 3.2): (a) down and up in space, which the released models use; (b) Fourier. Each
makes a matrix [grid, grid] from grid and level."""


@lru_cache(maxsize=64)
def lowpass_matrices(grid: int, filter_name: str = "spatial") -> NDArray[np.float32]:
    """Matrices M [grid + 1, grid, grid] that low-pass latents x [..., grid, grid] to level k: M[k] x M[k]^T.

    Level 0 is all zeros, level `grid` the identity. Level k between them is `filter_name`, one of FILTERS: by default
    it averages down to k x k and goes back up by bicubic resampling (FAR section 3.2; `processingpregt_latent` in the
    official models/far.py).
    """
    matrices = np.zeros((grid + 1, grid, grid))
    for level in range(1, grid):
        matrices[level] = FILTERS[filter_name](grid, level)
    matrices[grid] = np.eye(grid)
    rounded = matrices.astype(np.float32)
    rounded.flags.writeable = False
    return rounded


def lowpass(tokens: NDArray[np.float32], level: int) -> NDArray[np.float32]:
    """Tokens [B, L, C] of a square grid, low-passed to `level`, from 0 to the grid, which leaves them unchanged."""
    batch, length, channels = tokens.shape
    grid = round(length**0.5)
    matrix = lowpass_matrices(grid)[level]
    cells = tokens.reshape(batch, grid, grid, channels)
    filtered: NDArray[np.float32] = np.einsum("yh,bhwc,xw->byxc", matrix, cells, matrix, optimize=True)
    return filtered.reshape(tokens.shape)
