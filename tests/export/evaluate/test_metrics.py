"""The figures against other formulas."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from far_export.evaluate import metrics
from far_export.evaluate.metrics import (
    Statistics,
    feature_statistics,
    frechet_distance,
    frechet_from_features,
    inception_score,
    precision_recall,
)

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows, the last one smaller."""
    monkeypatch.setattr(metrics, "ROWS", 16)


def test_statistics_are_those_of_numpy() -> None:
    features = (1000 + RANDOM.normal(size=(50, 7))).astype(np.float32)
    found = feature_statistics(features)
    assert found.mean == pytest.approx(features.astype(np.float64).mean(axis=0), rel=1e-12)
    assert found.covariance == pytest.approx(np.cov(features.astype(np.float64), rowvar=False), rel=1e-9)


def test_distance_of_statistics_is_that_of_the_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    a, b = RANDOM.normal(size=(40, 5)), RANDOM.normal(size=(50, 5)) @ RANDOM.normal(size=(5, 5)) + 1
    one, other = feature_statistics(a), feature_statistics(b)
    root = sqrtm(one.covariance @ other.covariance).real
    expected = np.square(one.mean - other.mean).sum() + np.trace(one.covariance + other.covariance - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected)
    assert frechet_from_features(a, b) == pytest.approx(expected)
    zero = Statistics(np.zeros(2), np.zeros((2, 2)))
    assert frechet_distance(zero, Statistics(np.array([3.0, 4.0]), np.eye(2))) == pytest.approx(27)


def test_distance_holds_with_fewer_pictures_than_features() -> None:
    """Covariances without full rank: the distance is that within the space that both sets span."""
    a, b = RANDOM.normal(size=(6, 40)), RANDOM.normal(size=(7, 40)) + 0.5
    _, values, directions = np.linalg.svd(np.concatenate([a, b]), full_matrices=False)
    basis = directions[values > 1e-9].T
    assert basis.shape == (40, 13)
    assert frechet_from_features(a, b) == pytest.approx(frechet_from_features(a @ basis, b @ basis), rel=1e-6)
    assert frechet_from_features(a, a) == pytest.approx(0, abs=1e-6)


def test_inception_score_of_what_is_sure_and_even_is_the_number_of_classes() -> None:
    sure = np.eye(4)[np.arange(400) % 4]
    assert inception_score(sure) == (pytest.approx(4), pytest.approx(0, abs=1e-9))
    assert inception_score(np.full((400, 4), 0.25))[0] == pytest.approx(1)
    p = RANDOM.dirichlet(np.ones(5), 30)
    halves = [np.exp(np.mean([np.sum(q * np.log(q / part.mean(0))) for q in part])) for part in (p[:15], p[15:])]
    assert inception_score(p, 2) == (pytest.approx(np.mean(halves)), pytest.approx(np.std(halves)))


def test_precision_and_recall_are_those_of_every_pair() -> None:
    a, b = RANDOM.normal(size=(60, 3)), 0.7 + RANDOM.normal(size=(50, 3))

    def covered(points: NDArray[np.float64], centres: NDArray[np.float64]) -> float:
        radius = [sorted(np.linalg.norm(centres - centre, axis=1))[2] for centre in centres]
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius, strict=True)) for p in points]
        return float(np.mean(inside))

    precision, recall = precision_recall(a, b, k=2)
    assert (precision, recall) == (pytest.approx(covered(a, b)), pytest.approx(covered(b, a)))
    assert 0 < precision < 1
    assert 0 < recall < 1
    assert precision != recall
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 1000) == (0, 0)
