"""Networks as a manifest describes them, for tests of the loops that need no checkpoint."""

from __future__ import annotations

from far_runtime.model_info import FarInfo, FarT2iInfo, MarInfo, VarInfo
from far_runtime.sampling.pyramid import SCALES_256


def far_info(grid: int, masked: bool = False) -> FarInfo:
    return FarInfo(grid=grid, channels=4, image_size=4 * grid, classes=10, prediction="v", masked=masked)


def far_t2i_info(grid: int, channels: int = 4) -> FarT2iInfo:
    return FarT2iInfo(
        grid=grid, channels=channels, image_size=4 * grid, condition="text", prediction="epsilon", context_tokens=8,
        context_width=12,
    )  # fmt: skip


def mar_info(grid: int, channels: int = 2) -> MarInfo:
    return MarInfo(grid=grid, channels=channels, image_size=4 * grid, classes=5, prediction="epsilon")


def var_info(vocabulary: int = 4096) -> VarInfo:
    return VarInfo(
        grid=16, channels=32, image_size=256, classes=1000, patch_nums=SCALES_256, phis=4, vocabulary=vocabulary,
        width=1024, depth=16, heads=16,
    )  # fmt: skip
