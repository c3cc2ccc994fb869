"""All metrics of a set of drawn pictures against its references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_export.evaluate.features import ExtractedFeatures, FeatureExtractor
from far_export.evaluate.metrics import (
    COMPONENTS,
    MIN_SPLIT_SIZE,
    NEIGHBOURHOOD,
    SPLITS,
    feature_statistics,
    frechet_distance,
    frechet_from_features,
    inception_score,
    precision_recall,
    principal_components,
)
from far_export.evaluate.reference import Reference

Features = NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceMetrics:
    """Metrics of drawn pictures against one reference; None where the reference or the number of pictures does not
    allow them."""

    reference: str
    """The reference's name."""

    pictures: int | None
    """Number of the reference's pictures, None where only its statistics are known."""

    digest: str
    """SHA-256 of the reference's content."""

    frechet: float
    """Frechet distance over all features: FID with the features of Inception."""

    frechet_48: float | None = None
    """Frechet distance over the 48 leading principal components of the reference's features."""

    precision: float | None = None
    """Share of the drawn pictures that lie in the manifold of the reference's."""

    recall: float | None = None
    """Share of the reference's pictures that lie in the manifold of the drawn ones."""

    floor: float | None = None
    """`frechet` of the VAE's reconstructions of the reference's pictures (rFID)."""

    floor_48: float | None = None
    """`frechet_48` of the VAE's reconstructions."""

    notes: tuple[str, ...] = ()
    """What was not taken from the reference, and why."""

    missing: tuple[str, ...] = ()
    """Why metrics are missing."""

    @property
    def times_floor(self) -> float | None:
        """frechet / floor."""
        return self.frechet / self.floor if self.floor else None

    @property
    def times_floor_48(self) -> float | None:
        """frechet_48 / floor_48."""
        return self.frechet_48 / self.floor_48 if self.frechet_48 is not None and self.floor_48 else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "times_floor": self.times_floor, "times_floor_48": self.times_floor_48}


@dataclass(frozen=True)
class Evaluation:
    """All metrics of a set of drawn pictures."""

    count: int
    """Number of drawn pictures."""

    network: str
    """Name of the network whose features these are."""

    inception: bool
    """Whether that network is Inception, so that the metrics may be called FID and inception score."""

    score: float | None
    """Inception score: mean over the splits."""

    score_deviation: float | None
    """Standard deviation of the inception score over the splits."""

    against: tuple[ReferenceMetrics, ...]
    """Metrics against every reference."""

    missing: tuple[str, ...] = ()
    """Why there is no inception score."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """What the metrics depend on beside the references: bundle, engine, settings, versions."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "against": [metrics.to_dict() for metrics in self.against]}


def calculate_metrics(
    drawn: ExtractedFeatures,
    references: Sequence[Reference],
    network: FeatureExtractor,
    floors: Sequence[Features | None],
    run: Mapping[str, Any],
) -> Evaluation:
    """All metrics of two or more drawn pictures. floors: features of every reference's reconstructions."""
    fewest = SPLITS * MIN_SPLIT_SIZE
    score, deviation = inception_score(drawn.probabilities) if len(drawn) >= fewest else (None, None)
    statistics = feature_statistics(drawn.features)
    return Evaluation(
        count=len(drawn),
        network=network.name,
        inception=network.inception,
        score=score,
        score_deviation=deviation,
        against=tuple(
            compare_with_reference(drawn.features, reference, floor, frechet_distance(statistics, reference.statistics))
            for reference, floor in zip(references, floors, strict=True)
        ),
        missing=() if len(drawn) >= fewest else (f"needs {fewest} pictures",),
        run=run,
    )


def compare_with_reference(
    drawn: Features, reference: Reference, floor: Features | None, distance: float
) -> ReferenceMetrics:
    """Metrics of drawn features [N, D] against a reference. distance: their Frechet distance over all features."""
    metrics: dict[str, Any] = {"notes": (reference.note,) if reference.note else ()}
    if floor is not None:
        metrics["floor"] = frechet_distance(feature_statistics(floor), reference.statistics)
    missing = []
    real = reference.features
    if real is None:
        missing.append("precision, recall and the distance over principal components need the reference's pictures")
    else:
        fewest = min(len(drawn), len(real))
        if fewest > NEIGHBOURHOOD:
            metrics["precision"], metrics["recall"] = precision_recall(drawn, real)
        else:
            missing.append(f"precision and recall need {NEIGHBOURHOOD + 1} pictures of each set")
        if fewest > COMPONENTS:
            basis = principal_components(real.astype(np.float64))
            metrics["frechet_48"] = frechet_from_features(drawn @ basis, real @ basis)
            if floor is not None:
                metrics["floor_48"] = frechet_from_features(floor @ basis, real @ basis)
        else:
            missing.append(f"a distance over {COMPONENTS} components needs {COMPONENTS + 1} pictures of each set")
    return ReferenceMetrics(
        reference=reference.name,
        pictures=reference.count,
        digest=reference.digest,
        frechet=distance,
        missing=tuple(missing),
        **metrics,
    )
