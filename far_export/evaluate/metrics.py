"""Metrics over image features: Frechet distance, inception score, precision and recall."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COMPONENTS = 48
"""Principal components of the distances that a few hundred pictures suffice for."""

SPLITS = 10
"""Splits of the inception score."""

MIN_SPLIT_SIZE = 10
"""Fewest pictures of a split: with fewer, an inception score depends more on their number than on the pictures."""

NEIGHBOURHOOD = 3
"""k of the k-th nearest neighbour, of precision and recall."""

MAX_REFERENCE_PICTURES = 10_000
"""Most reference pictures of precision and recall: as many as ADM's evaluator takes."""

ROWS = 1024
"""Rows of a matrix that are computed together."""


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features."""

    mean: NDArray[np.float64]
    """[D]."""

    covariance: NDArray[np.float64]
    """[D, D]."""


def feature_statistics(features: NDArray[np.floating]) -> Statistics:
    """Mean and sample covariance (divided by N - 1) of features [N, D] of any type, N >= 2."""
    mean: NDArray[np.float64] = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((features.shape[1], features.shape[1]))
    for start in range(0, len(features), ROWS):
        centred = features[start : start + ROWS].astype(np.float64) - mean
        covariance += centred.T @ centred
    return Statistics(mean, covariance / (len(features) - 1))


def principal_components(vectors: NDArray[np.float64], count: int = COMPONENTS) -> NDArray[np.float64]:
    """Orthonormal directions [D, count] of the largest variance of vectors [N, D], not scaled by it."""
    _, _, directions = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    leading: NDArray[np.float64] = directions[:count].T
    return leading


def frechet_from_features(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Squared Frechet distance of the Gaussians fitted to a [N, D] and b [M, D] (Heusel et al. 2017, eq. 6)."""
    return frechet_distance(feature_statistics(a), feature_statistics(b))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance of two Gaussians: |mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^(1/2)).

    The trace of (A B)^(1/2) is the sum of the square roots of the eigenvalues of B^(1/2) A B^(1/2), which is symmetric
    and positive semidefinite, so that neither an iteration nor a complex number is needed.
    """
    root = _square_root(b.covariance)
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ a.covariance @ root), 0, None)).sum()
    shift = a.mean - b.mean
    return max(float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared), 0.0)


def _square_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def inception_score(probabilities: NDArray[np.floating], splits: int = SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over the splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016).

    probabilities: [N, K], in the order of the pictures.
    """
    scores = []
    for part in np.array_split(probabilities.astype(np.float64), splits):
        p = np.clip(part, 1e-16, None)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    drawn: NDArray[np.floating], reference: NDArray[np.floating], k: int = NEIGHBOURHOOD
) -> tuple[float, float]:
    """Improved precision and recall of drawn features [N, D] against a reference's [M, D], N and M > k (Kynkaanniemi et
    al. 2019).

    Precision is the share of drawn features that lie in the reference's manifold: in a ball around some reference
    feature, whose radius is the distance to its k-th nearest neighbour. Recall is the same with the sets exchanged.
    """
    return _share_in_manifold(drawn, reference, k), _share_in_manifold(reference, drawn, k)


def _share_in_manifold(points: NDArray[np.floating], centres: NDArray[np.floating], k: int) -> float:
    """Share of points that lie in a ball around at least one centre."""
    centres, points = centres.astype(np.float32), points.astype(np.float32)
    radius = np.concatenate([np.partition(block, k, axis=1)[:, k] for block in _squared_distances(centres, centres)])
    inside = [(block <= radius).any(axis=1) for block in _squared_distances(points, centres)]
    return float(np.concatenate(inside).mean())


def _squared_distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Squared distances of a [N, D] to b [M, D], in blocks of some rows."""
    norms = np.einsum("nd,nd->n", b, b)
    for start in range(0, len(a), ROWS):
        rows = a[start : start + ROWS]
        yield np.maximum(np.einsum("nd,nd->n", rows, rows)[:, None] + norms - 2 * rows @ b.T, 0)
