"""The floor of a model's figures: what its VAE makes of the reference's own pictures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from far_export.evaluate.features import Extractor, best_device
from far_export.evaluate.reference import Pixels, Reference, features_of
from far_models.checkpoint.load import load_checkpoint
from far_models.reconstruction import reconstruct_pixels
from far_runtime.errors import FarError
from far_runtime.progress import Reporting, silent


@dataclass(frozen=True)
class Floor:
    """A VAE and the SHA-256 of its checkpoint."""

    vae: nn.Module
    digest: str

    def features(
        self, reference: Reference, network: Extractor, reporting: Reporting = silent
    ) -> NDArray[np.float32] | None:
        """Features [N, D] of the reconstructions of all the reference's pictures; None where it has none."""
        if reference.read is None or reference.count is None:
            return None

        def rebuilt(pictures: Pixels) -> Pixels:
            try:
                return reconstruct_pixels(self.vae, pictures)
            except RuntimeError as error:
                sides = f"{pictures.shape[2]} x {pictures.shape[1]}"
                raise FarError(f"--floor: the VAE does not take {reference.name}'s {sides} pixels ({error})") from error

        title = f"reconstructions of {reference.name}"
        _, found = features_of(reference.read, reference.count, network, title, reporting, rebuilt, self.digest)
        return found


def open_floor(path: Path, kind: str) -> Floor:
    """The VAE of a checkpoint of that kind; FarError for any other."""
    vae = load_checkpoint(path, expect=kind).model.to(best_device())
    return Floor(vae, hashlib.sha256(path.read_bytes()).hexdigest())
