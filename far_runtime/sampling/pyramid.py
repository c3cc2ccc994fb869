"""The pyramid of token maps that VAR draws: its scales, their tokens' places, and the tokens that an edit keeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from far_runtime.sampling.lowpass import area_matrix, bicubic_matrix

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
"""Sides of the official models' token maps, for pictures of 256 and 512 pixels."""


def token_ranges(scales: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of every scale in the sequence of all scales' tokens; the end is excluded."""
    ends = np.cumsum([side * side for side in scales]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def phi_index(scale: int, scales: int, phis: int) -> int:
    """Which of `phis` convolutions blends scale number `scale` of `scales` into the feature map.

    It is the one whose place between the first and the last scale is nearest (PhiPartiallyShared in the official
    models/quant.py).
    """
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    places = np.linspace(margin, 1 - margin, phis)
    return int(np.argmin(np.abs(places - progress(scale, scales))))


def progress(scale: int, scales: int) -> float:
    """0 at the first scale, 1 at the last; 0 at an only one."""
    return scale / (scales - 1) if scales > 1 else 0.0


@lru_cache(maxsize=4)
def resize_tables(scales: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Bicubic upsampling and area downsampling between every scale and the last one, as matrices over tokens.

    Returns the tables up and down, each [tokens of all scales, cells of the last scale]. The tokens x [T, C] of a scale
    become up[range]^T x [cells, C] at the last scale, and cells y become down[range] y at the scale. A row is the
    Kronecker product of the rows of the two axes.
    """
    last = scales[-1]
    up, down = [], []
    for side in scales:
        grow = bicubic_matrix(side, last) if side < last else np.eye(last)
        shrink = area_matrix(last, side)
        up.append(np.kron(grow, grow).T)
        down.append(np.kron(shrink, shrink))
    tables = np.concatenate(up).astype(np.float32), np.concatenate(down).astype(np.float32)
    for table in tables:
        table.flags.writeable = False
    return tables


def kept_tokens(keep: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Which tokens [B, side * side] of a scale an edit keeps, from the cells [B, h, w] that it keeps.

    The cells are resized bilinearly, without antialiasing, and a token is kept where more than half of it is; the
    1 x 1 scale is always kept (replace_embedding in the official demo_zero_shot_edit.ipynb). Computed in float32 as
    there, since values of exactly one half decide.
    """
    batch, height, width = keep.shape
    if side == 1:
        return np.ones((batch, 1), np.bool_)
    across, down = _bilinear(width, side), _bilinear(height, side)
    resized = down @ (keep.astype(np.float32) @ across.T)
    kept: NDArray[np.bool_] = (resized > 0.5).reshape(batch, side * side)
    return kept


def _bilinear(size: int, to: int) -> NDArray[np.float32]:
    """[to, size] matrix of bilinear resampling as torch's `interpolate(mode="bilinear", align_corners=False)` does.

    Position i of the result is step (i + 0.5) - 0.5 with a float32 step, rounded once, as compilers fuse it.
    """
    step = float(np.float32(size) / np.float32(to))
    matrix = np.zeros((to, size), np.float32)
    for i in range(to):
        place = np.float32(max(step * (i + 0.5) - 0.5, 0.0))
        first = int(place)
        second = min(first + 1, size - 1)
        matrix[i, first] += 1 - (place - np.float32(first))
        matrix[i, second] += place - np.float32(first)
    return matrix
