"""How far a schedule's pictures are from the official one's: by image features, and by the latents' frequencies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from far_export.evaluate.feature_cache import FeatureCache
from far_export.evaluate.features import features
from far_export.evaluate.metrics import frechet, principal_components
from far_export.tune.search import Judged, Settings
from far_runtime.conditioning.subjects import spread_subjects
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.flops import picture_cost
from far_runtime.sampling.settings import plan_of, resolve_settings

FEATURES = 1280
BATCH = 32

Vectors = NDArray[np.float64]


def frequencies(latents: NDArray[np.float32], grid: int) -> Vectors:
    """Coefficients [N, grid grid C] of the orthonormal two-dimensional DCT-II of latents [N, L, C]."""
    k, x = np.mgrid[0:grid, 0:grid]
    matrix = np.sqrt((1 + (k > 0)) / grid) * np.cos(np.pi * (x + 0.5) * k / grid)
    cells = latents.astype(np.float64).reshape(len(latents), grid, grid, -1)
    found: Vectors = np.einsum("ki,lj,nijc->nklc", matrix, matrix, cells).reshape(len(latents), -1)
    return found


def spectral_distance(a: Vectors, b: Vectors) -> float:
    """Squared Frechet distance of diagonal Gaussians: every frequency's mean and standard deviation by channel."""
    means, deviations = a.mean(axis=0) - b.mean(axis=0), a.std(axis=0) - b.std(axis=0)
    return float(means @ means + deviations @ deviations)


class Judge:
    """Distances of candidates to a reference set, in units of the distance of two reference sets.

    The reference is the official preset unless other settings are given, with the seeds A (seed .. seed + count - 1)
    and B (the `count` behind them); a candidate is drawn with the seeds A and compared with set B, so that a schedule
    that changes nothing has the ratio 1. A second look (`again`) exchanges the two.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        network: torch.nn.Module,
        count: int,
        seed: int,
        cache: FeatureCache,
        report: Callable[[str], None] = lambda line: None,
        reference: Settings | None = None,
    ) -> None:
        """reference: resolved settings of the reference sets, in place of the official preset's."""
        self._pipeline, self._network, self._cache, self._report = pipeline, network, cache, report
        self._manifest = pipeline.bundle.manifest
        self._seeds = [range(seed + i * count, seed + (i + 1) * count) for i in range(2)]
        self._subjects = spread_subjects(self._manifest, count)
        self._settings = reference or resolve_settings(self._manifest, {"preset": "official"})
        self._reference: tuple[Vectors, Vectors] | None = None
        self._told: set[str] = set()
        self.seconds = 0.0

    def __call__(self, settings: Settings) -> Judged:
        """Judge a candidate."""
        return self._judge(settings, 0)

    def again(self, settings: Settings) -> Judged:
        """Judge it once more, with the seeds B and against set A."""
        return self._judge(settings, 1)

    def cost(self, settings: Settings) -> float:
        """Arithmetic of a picture."""
        return sum(picture_cost(self._manifest, plan_of(self._manifest, settings)).values())

    def references(self) -> tuple[Vectors, Vectors]:
        """The reference sets, drawn or taken from the cache."""
        if self._reference is None:
            found = []
            for name, seeds in zip("AB", self._seeds[:2], strict=True):
                kept = self._cache.find(seeds)
                if kept is None:
                    self._report(f"drawing {len(seeds)} pictures by the reference schedule (set {name})")
                    kept = self._draw(self._settings, seeds)
                    self._cache.keep(seeds, kept)
                found.append(kept)
            self._reference = found[0], found[1]
        return self._reference

    def _judge(self, settings: Settings, which: int) -> Judged:
        a, b = self.references()[:: -1 if which else 1]
        ours = self._draw(settings, self._seeds[which])
        basis = principal_components(b[:, :FEATURES])

        def distances(vectors: Vectors) -> tuple[float, float]:
            image = frechet(vectors[:, :FEATURES] @ basis, b[:, :FEATURES] @ basis)
            return image, spectral_distance(vectors[:, FEATURES:], b[:, FEATURES:])

        (image, latents), (own_image, own_latents) = distances(ours), distances(a)
        per_picture = self.seconds / len(self._subjects)
        return Judged(settings, self.cost(settings), image / own_image, latents / own_latents, per_picture)

    def _draw(self, settings: Settings, seeds: Sequence[int]) -> Vectors:
        """Features and frequencies [N, 1280 + L C] of the pictures of these settings; notes the seconds."""
        started = time.perf_counter()
        made = self._pipeline.generate(self._subjects, seeds, batch_size=BATCH, **settings)
        self.seconds = time.perf_counter() - started
        for warning in set(made.warnings) - self._told:
            self._told.add(warning)
            self._report(f"warning: {warning}")
        return np.concatenate([self._features(made.images), frequencies(made.latents, self._grid)], axis=1)

    def _features(self, images: NDArray[np.uint8]) -> Vectors:
        return features(self._network, images)

    @property
    def _grid(self) -> int:
        return self._manifest.model.grid
