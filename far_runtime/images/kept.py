"""The image that an edit starts from, as the sampling loop sees it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import Bundle
from far_runtime.engines.base import Engine
from far_runtime.errors import FarError
from far_runtime.sampling.base import KeptRegion


@dataclass(frozen=True)
class KeptImage:
    """An image of which an edit keeps some cells."""

    latents: NDArray[np.float32]
    """What the encode stage returns for the image [1, ...]."""
    cells: NDArray[np.bool_]
    """[1, h, w], True where a cell of the latents is kept."""

    def region(self, engine: Engine, batch: int) -> KeptRegion:
        """The same for every picture of a batch, on the engine's device."""
        return KeptRegion(engine.put(np.repeat(self.latents, batch, axis=0)), np.repeat(self.cells, batch, axis=0))


def kept_cells(bundle: Bundle, image: NDArray[np.uint8], keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The cells [1, h, w] of a bundle's latents of which every pixel is kept.

    The image is [H, W, 3]; keep [H, W] is True where it stays. Raises FarError for other sizes than the bundle's, a
    bundle that cannot edit, and where all of the image is kept.
    """
    size, grid = bundle.manifest.model.image_size, bundle.manifest.model.grid
    if image.shape != (size, size, 3) or keep.shape != (size, size):
        raise FarError(
            f"image of {image.shape[1]} x {image.shape[0]} pixels, mask of {keep.shape[1]} x {keep.shape[0]}: this "
            f"bundle edits pictures of {size} x {size}"
        )
    if not bundle.manifest.has_stage("encode"):
        raise FarError(f"{bundle.path}: has no encode stage, so it cannot edit; export it again without --no-editing")
    if keep.all():
        raise FarError("the mask keeps every pixel, so there is nothing to change; mark what to draw again")
    return np.asarray(keep.reshape(1, grid, size // grid, grid, size // grid).all(axis=(2, 4)))
