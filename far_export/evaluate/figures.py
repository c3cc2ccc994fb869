"""All figures of a set of drawn pictures against its references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_export.evaluate.features import Extractor, Found
from far_export.evaluate.metrics import (
    COMPONENTS,
    NEIGHBOURS,
    SMALLEST_SPLIT,
    SPLITS,
    frechet,
    frechet_of,
    inception_score,
    precision_recall,
    principal_components,
    statistics_of,
)
from far_export.evaluate.reference import Reference

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Against:
    """Figures of pictures against one reference; None where it, or the number of pictures, does not allow them.

    pictures, digest: number and content of the reference's pictures. frechet: over all features. frechet_48: over the
    48 leading principal components of the reference's features. floor, floor_48: the same of the reference's
    reconstructions. missing: why figures are missing.
    """

    reference: str
    pictures: int | None
    digest: str
    frechet: float
    frechet_48: float | None = None
    precision: float | None = None
    recall: float | None = None
    floor: float | None = None
    floor_48: float | None = None
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

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
class Figures:
    """Everything that was measured on `count` pictures. network: whose features; only those of Inception are FID.
    run: what the figures depend on beside the references."""

    count: int
    network: str
    inception: bool
    score: float | None
    score_deviation: float | None
    against: tuple[Against, ...]
    missing: tuple[str, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "against": [one.to_dict() for one in self.against]}


def figures(
    found: Found,
    references: Sequence[Reference],
    network: Extractor,
    floors: Sequence[Features | None],
    run: Mapping[str, Any],
) -> Figures:
    """All figures of two or more drawn pictures; floors: features of every reference's reconstructions."""
    enough = len(found) >= SPLITS * SMALLEST_SPLIT
    score, deviation = inception_score(found.probabilities) if enough else (None, None)
    missing = () if enough else (f"needs {SPLITS * SMALLEST_SPLIT} pictures",)
    drawn = statistics_of(found.features)
    against = tuple(
        compared(found.features, reference, floor, frechet_of(drawn, reference.statistics))
        for reference, floor in zip(references, floors, strict=True)
    )
    return Figures(len(found), network.name, network.inception, score, deviation, against, missing, run)


def compared(drawn: Features, reference: Reference, floor: Features | None, distance: float) -> Against:
    """Figures of drawn features [N, D] against a reference, beside their distance over all features."""
    made: dict[str, Any] = {"notes": (reference.note,) if reference.note else ()}
    if floor is not None:
        made["floor"] = frechet_of(statistics_of(floor), reference.statistics)
    missing = []
    wanted = reference.features
    if wanted is None:
        missing.append("precision, recall and the distance over principal components need the reference's pictures")
    else:
        fewest = min(len(drawn), len(wanted))
        if fewest > NEIGHBOURS:
            made["precision"], made["recall"] = precision_recall(drawn, wanted)
        else:
            missing.append(f"precision and recall need {NEIGHBOURS + 1} pictures of each set")
        if fewest > COMPONENTS:
            made |= _leading(drawn, wanted, floor)
        else:
            missing.append(f"a distance over {COMPONENTS} components needs {COMPONENTS + 1} pictures of each set")
    return Against(
        reference.name, reference.count, reference.digest, distance, missing=tuple(missing), **made
    )  # fmt: skip


def _leading(drawn: Features, wanted: Features, floor: Features | None) -> dict[str, float]:
    """Distances over the leading principal components of the reference's features."""
    basis = principal_components(wanted.astype(np.float64))
    found = {"frechet_48": frechet(drawn @ basis, wanted @ basis)}
    if floor is not None:
        found["floor_48"] = frechet(floor @ basis, wanted @ basis)
    return found
