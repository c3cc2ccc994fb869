"""How two arrays differ, and the same summed over many calls without keeping the arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MID_GREY = 128.0


@dataclass(frozen=True)
class Comparison:
    """An array against its reference.

    difference, reference, other: norms of a - b, b and a over the entries that are finite on both sides; dot: their
    inner product. scale: what the difference is judged against, the reference's norm or more. nonfinite, and
    nonfinite_reference: entries that are NaN or infinite.
    """

    difference: float
    reference: float
    other: float
    dot: float
    scale: float
    max_abs: float
    nonfinite: int = 0
    nonfinite_reference: int = 0

    @property
    def error(self) -> float:
        """difference / scale; infinite where either side has an entry that is not finite."""
        if self.nonfinite or self.nonfinite_reference:
            return math.inf
        return _ratio(self.difference, self.scale)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; 1 where both are zero, 0 where one is."""
        norms = self.reference * self.other
        if norms == 0:
            return 1.0 if self.reference == self.other else 0.0
        return max(-1.0, min(1.0, self.dot / norms))


def compare(got: NDArray[Any], expected: NDArray[Any], floor: float = 0.0) -> Comparison:
    """Compare arrays of one shape in float64.

    floor: the least that the difference is judged against. Pixels (uint8) have their own, a mid-grey picture: one grey
    value more or less is nothing in a black picture either. Arrays of two shapes differ in every entry.
    """
    if got.shape != expected.shape:
        return Comparison(math.inf, 0.0, 0.0, 0.0, 1.0, math.inf)
    if expected.dtype == np.uint8:
        floor = MID_GREY * math.sqrt(expected.size)
    a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    finite_a, finite_b = np.isfinite(a), np.isfinite(b)
    both = finite_a & finite_b
    if not both.all():
        a, b = a[both], b[both]
    difference = a - b
    reference = float(np.linalg.norm(b))
    return Comparison(
        difference=float(np.linalg.norm(difference)),
        reference=reference,
        other=float(np.linalg.norm(a)),
        dot=float(a @ b),
        scale=max(reference, floor),
        max_abs=float(np.abs(difference).max(initial=0.0)),
        nonfinite=int(got.size - finite_a.sum()),
        nonfinite_reference=int(expected.size - finite_b.sum()),
    )


@dataclass
class Tally:
    """What many comparisons come to: the worst call, on either side the first with an entry that is not finite, and
    sums over all calls. Calls are counted from 0."""

    calls: int = 0
    error: float = 0.0
    worst_call: int = 0
    cosine: float = 1.0
    max_abs: float = 0.0
    nonfinite: int = 0
    nonfinite_reference: int = 0
    first_nonfinite: int | None = None
    first_nonfinite_reference: int | None = None
    squared_difference: float = 0.0
    squared_reference: float = 0.0

    def add(self, comparison: Comparison) -> None:
        """Count one call."""
        if comparison.error > self.error:
            self.error, self.worst_call = comparison.error, self.calls
        self.cosine = min(self.cosine, comparison.cosine)
        self.max_abs = max(self.max_abs, comparison.max_abs)
        if comparison.nonfinite and self.first_nonfinite is None:
            self.first_nonfinite = self.calls
        if comparison.nonfinite_reference and self.first_nonfinite_reference is None:
            self.first_nonfinite_reference = self.calls
        self.nonfinite += comparison.nonfinite
        self.nonfinite_reference += comparison.nonfinite_reference
        self.squared_difference += comparison.difference**2
        self.squared_reference += comparison.reference**2
        self.calls += 1

    @property
    def relative_error(self) -> float:
        """||a - b|| / ||b|| over all calls together."""
        if self.nonfinite or self.nonfinite_reference:
            return math.inf
        return _ratio(math.sqrt(self.squared_difference), math.sqrt(self.squared_reference))


def psnr(got: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB; infinite where they are equal."""
    mean_square = float(np.mean((got.astype(np.float64) - expected) ** 2))
    return math.inf if mean_square == 0 else 10 * math.log10(255.0**2 / mean_square)


def _ratio(difference: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / scale
