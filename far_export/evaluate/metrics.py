"""Figures over image features: Frechet distance, inception score, precision and recall."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COMPONENTS = 48
"""Principal components of the distances that a few hundred pictures can tell."""

SPLITS = 10
SMALLEST_SPLIT = 10
"""Pictures of a split: with fewer, an inception score says more of their number than of the pictures."""

NEIGHBOURS = 3
MOST_REFERENCES = 10_000
"""Reference pictures of precision and recall: as many as ADM's evaluator takes."""

ROWS = 1024


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


def statistics_of(features: NDArray[np.floating]) -> Statistics:
    """Mean and covariance (of a sample: n - 1) of two or more features [N, D], of any type, some rows at a time."""
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


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Squared Frechet distance of the Gaussians fitted to a [N, D] and b [M, D] (Heusel et al. 2017, eq. 6).

    The trace of (A B)^(1/2) is the sum of the square roots of the eigenvalues of B^(1/2) A B^(1/2), which is symmetric
    and positive semidefinite, so that neither an iteration nor a complex number is needed.
    """
    return frechet_of(statistics_of(a), statistics_of(b))


def frechet_of(a: Statistics, b: Statistics) -> float:
    """Squared Frechet distance of two Gaussians by their statistics."""
    root = _square_root(b.covariance)
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ a.covariance @ root), 0, None)).sum()
    shift = a.mean - b.mean
    return max(float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared), 0.0)


def _square_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def inception_score(probabilities: NDArray[np.floating], splits: int = SPLITS) -> tuple[float, float]:
    """Mean and deviation over the splits of exp(mean KL(p(y|x) || p(y))) of probabilities [N, K] in the order of the
    pictures (Salimans et al. 2016)."""
    scores = []
    for part in np.array_split(probabilities.astype(np.float64), splits):
        p = np.clip(part, 1e-16, None)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    drawn: NDArray[np.floating], reference: NDArray[np.floating], k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Improved precision and recall of features [N, D] against [M, D] (Kynkaanniemi et al. 2019).

    Precision: share of the drawn that lie within the distance of some reference to its k-th nearest other one; recall:
    the same the other way round. Both sets need more than k rows. Distances are computed for some rows at a time.
    """
    return _covered(drawn, reference, k), _covered(reference, drawn, k)


def _covered(points: NDArray[np.floating], centres: NDArray[np.floating], k: int) -> float:
    """Share of points in at least one ball around a centre, as large as its distance to the k-th nearest centre."""
    centres, points = centres.astype(np.float32), points.astype(np.float32)
    radius = np.concatenate([np.partition(block, k, axis=1)[:, k] for block in _squared(centres, centres)])
    inside = [(block <= radius).any(axis=1) for block in _squared(points, centres)]
    return float(np.concatenate(inside).mean())


def _squared(a: NDArray[np.float32], b: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Squared distances of rows of a [N, D] to b [M, D], some rows at a time; 0 is the nearest, a row itself."""
    norms = np.einsum("nd,nd->n", b, b)
    for start in range(0, len(a), ROWS):
        rows = a[start : start + ROWS]
        yield np.maximum(np.einsum("nd,nd->n", rows, rows)[:, None] + norms - 2 * rows @ b.T, 0)
