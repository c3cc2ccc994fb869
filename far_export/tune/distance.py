"""The distance of a schedule's pictures to the official one's: by image features, and by the latents' frequencies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from far_export.evaluate.feature_cache import FeatureCache
from far_export.evaluate.features import WIDTH, extract_features
from far_export.evaluate.metrics import frechet_from_features, principal_components
from far_export.tune.search import Candidate, Settings
from far_runtime.conditioning.subjects import spread_subjects
from far_runtime.errors import Message
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.flops import picture_cost
from far_runtime.sampling.settings import plan_of, resolve_settings

BATCH = 32

Vectors = NDArray[np.float64]


def frequencies(latents: NDArray[np.float32], grid: int) -> Vectors:
    """Coefficients [N, grid grid C] of the orthonormal two-dimensional DCT-II of latents [N, L, C]."""
    k, x = np.mgrid[0:grid, 0:grid]
    matrix = np.sqrt((1 + (k > 0)) / grid) * np.cos(np.pi * (x + 0.5) * k / grid)
    cells = latents.astype(np.float64).reshape(len(latents), grid, grid, -1)
    coefficients: Vectors = np.einsum("ki,lj,nijc->nklc", matrix, matrix, cells).reshape(len(latents), -1)
    return coefficients


def spectral_distance(a: Vectors, b: Vectors) -> float:
    """Squared Frechet distance of diagonal Gaussians fitted to coefficients a [N, D] and b [M, D]."""
    means, deviations = a.mean(axis=0) - b.mean(axis=0), a.std(axis=0) - b.std(axis=0)
    return float(means @ means + deviations @ deviations)


class Scorer:
    """Distances of candidates to a reference set of pictures, over the distance of two reference sets.

    Two reference sets are drawn: A with the seeds seed .. seed + count - 1, B with the next `count` seeds. A candidate
    is drawn with the seeds of A and compared with set B, so that a schedule that changes nothing has the ratio 1.
    `confirm` exchanges A and B.
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
        """reference: resolved settings of the reference sets, None for the official preset's."""
        self._pipeline, self._network, self._cache, self._report = pipeline, network, cache, report
        self._manifest = pipeline.bundle.manifest
        self._seeds = [range(seed + i * count, seed + (i + 1) * count) for i in range(2)]
        self._subjects = spread_subjects(self._manifest, count)
        self._settings = reference or resolve_settings(self._manifest, {"preset": "official"})
        self._references: tuple[Vectors, Vectors] | None = None
        self._reported: set[str] = set()
        self.seconds = 0.0
        """Seconds that the last set of pictures took."""

    def __call__(self, settings: Settings) -> Candidate:
        """Draw with the seeds of A and compare with set B."""
        own, other = self.references()
        return self._score(settings, self._seeds[0], own, other)

    def confirm(self, settings: Settings) -> Candidate:
        """Draw with the seeds of B and compare with set A."""
        other, own = self.references()
        return self._score(settings, self._seeds[1], own, other)

    def cost(self, settings: Settings) -> float:
        """FLOPs of a picture."""
        return sum(picture_cost(self._manifest, plan_of(self._manifest, settings)).values())

    def references(self) -> tuple[Vectors, Vectors]:
        """The vectors of the reference sets A and B, computed or taken from the cache."""
        if self._references is None:
            a, b = (self._reference(name, seeds) for name, seeds in zip("AB", self._seeds, strict=True))
            self._references = a, b
        return self._references

    def _reference(self, name: str, seeds: Sequence[int]) -> Vectors:
        vectors = self._cache.find(seeds)
        if vectors is None:
            self._report(f"drawing {len(seeds)} pictures by the reference schedule (set {name})")
            vectors = self._draw(self._settings, seeds)
            self._cache.keep(seeds, vectors)
        return vectors

    def _score(self, settings: Settings, seeds: Sequence[int], own: Vectors, other: Vectors) -> Candidate:
        """own, other: the reference sets of the same seeds and of the other ones."""
        vectors = self._draw(settings, seeds)
        basis = principal_components(other[:, :WIDTH])

        def distances(vectors: Vectors) -> tuple[float, float]:
            image = frechet_from_features(vectors[:, :WIDTH] @ basis, other[:, :WIDTH] @ basis)
            return image, spectral_distance(vectors[:, WIDTH:], other[:, WIDTH:])

        (image, latents), (reference_image, reference_latents) = distances(vectors), distances(own)
        return Candidate(
            settings=settings,
            flops=self.cost(settings),
            image=image / reference_image,
            latents=latents / reference_latents,
            seconds=self.seconds / len(self._subjects),
        )

    def _draw(self, settings: Settings, seeds: Sequence[int]) -> Vectors:
        """Features and frequencies [N, 1280 + L C] of the pictures of these settings; notes the seconds."""
        started = time.perf_counter()
        drawn = self._pipeline.generate(self._subjects, seeds, batch_size=BATCH, **settings)
        self.seconds = time.perf_counter() - started
        for warning in set(drawn.warnings) - self._reported:
            self._reported.add(warning)
            self._report(Message("warning: ", warning))
        features = extract_features(self._network, drawn.images)
        return np.concatenate([features, frequencies(drawn.latents, self._manifest.model.grid)], axis=1)
