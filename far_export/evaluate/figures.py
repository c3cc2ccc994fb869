"""All figures of a set of drawn pictures against its references."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from far_export.evaluate.metrics import (
    COMPONENTS,
    frechet,
    frechet_of,
    inception_score,
    precision_recall,
    principal_components,
    statistics_of,
)
from far_export.evaluate.networks import Extractor, Found
from far_export.evaluate.reference import READ, Reference

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Against:
    """Figures of pictures against one reference; None where the reference does not allow it.

    frechet: over all features. frechet_48: over the 48 leading principal components of the reference's features.
    floor, floor_48: the same of the reference's reconstructions.
    """

    reference: str
    reference_pictures: int | None
    frechet: float
    frechet_48: float | None = None
    precision: float | None = None
    recall: float | None = None
    floor: float | None = None
    floor_48: float | None = None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figures:
    """Everything that was measured on `count` pictures. network: whose features; only those of Inception are FID."""

    count: int
    network: str
    inception: bool
    score: float
    score_deviation: float
    against: tuple[Against, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def compared(found: Found, reference: Reference, floor: NDArray[np.float32] | None = None) -> Against:
    """Figures of drawn pictures against a reference; `floor`: features of its reconstructions."""
    distance = frechet_of(statistics_of(found.features), reference.statistics)
    whole_floor = None if floor is None else frechet_of(statistics_of(floor), reference.statistics)
    if reference.features is None:
        why = "precision, recall and the distance over principal components need the reference's pictures"
        return Against(reference.name, reference.count, distance, floor=whole_floor, missing=(why,))
    precision, recall = precision_recall(found.features, reference.features)
    few = f"a distance over {COMPONENTS} components needs {COMPONENTS + 1} pictures of each set"
    leading, floor_leading = None, None
    missing: tuple[str, ...] = (few,)
    if min(len(found), len(reference.features)) > COMPONENTS:
        wanted = reference.features.astype(np.float64)
        basis = principal_components(wanted)
        leading, missing = frechet(found.features.astype(np.float64) @ basis, wanted @ basis), ()
        if floor is not None:
            floor_leading = frechet(floor.astype(np.float64) @ basis, wanted @ basis)
    return Against(
        reference.name, reference.count, distance, leading, precision, recall, whole_floor, floor_leading, missing
    )


def figures(
    found: Found,
    references: list[Reference],
    network: Extractor,
    floors: dict[str, NDArray[np.float32]],
    facts: dict[str, Any],
) -> Figures:
    """All figures; floors: features of reconstructions by the reference's name."""
    score, deviation = inception_score(found.probabilities)
    against = tuple(compared(found, reference, floors.get(reference.name)) for reference in references)
    return Figures(len(found), network.name, network.inception, score, deviation, against, facts)


def floor_of(vae: nn.Module, reference: Reference, network: Extractor) -> NDArray[np.float32] | None:
    """Features [N, D] of the reconstructions of a reference's pictures; None where it has none."""
    from far_models.training.vae import reconstruct_pixels

    if reference.read is None or reference.count is None:
        return None
    parts = []
    for start in range(0, reference.count, READ):
        pictures = reference.read(np.arange(start, min(start + READ, reference.count)))
        parts.append(network(reconstruct_pixels(vae, pictures)).features)
    return np.concatenate(parts)
