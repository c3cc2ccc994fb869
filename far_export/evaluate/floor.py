"""The floor of a model's metrics: what its VAE makes of the reference's own pictures (rFID)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from far_export.evaluate.features import FeatureExtractor, best_device
from far_export.evaluate.reference import Pixels, Reference, cached_features
from far_models.checkpoint.load import load_checkpoint
from far_models.reconstruction import reconstruct_pixels
from far_runtime.bundle import sha256_of
from far_runtime.errors import FarError
from far_runtime.progress import Reporting, silent


@dataclass(frozen=True)
class Floor:
    """A VAE whose reconstructions are compared with the pictures that they are made of."""

    vae: nn.Module
    """The VAE, on the device of `best_device`."""

    digest: str
    """SHA-256 of its checkpoint."""

    def features(
        self, reference: Reference, network: FeatureExtractor, reporting: Reporting = silent
    ) -> NDArray[np.float32] | None:
        """Features [N, D] of the reconstructions of all the reference's pictures; None for a reference without
        pictures."""
        if reference.read is None or reference.count is None:
            return None

        def reconstruct(pictures: Pixels) -> Pixels:
            try:
                return reconstruct_pixels(self.vae, pictures)
            except RuntimeError as error:
                sides = f"{pictures.shape[2]} x {pictures.shape[1]}"
                raise FarError(f"--floor: the VAE does not take {reference.name}'s {sides} pixels ({error})") from error

        title = f"reconstructions of {reference.name}"
        _, features = cached_features(
            reference.read, reference.count, network, title, reporting, reconstruct, self.digest
        )
        return features


def open_floor(path: Path, system: str) -> Floor:
    """The VAE in a checkpoint; FarError where it is not of that system ("klvae" or "vqvae")."""
    vae = load_checkpoint(path, expect=system).model.to(best_device())
    return Floor(vae, sha256_of(path))
