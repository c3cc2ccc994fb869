"""How two arrays differ, and the statistics of that over many calls without keeping the arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MID_GREY = 128.0


@dataclass(frozen=True)
class Comparison:
    """An array against its reference; norms are over the values that are finite on both sides."""

    difference_norm: float
    """||array - reference||."""
    reference_norm: float
    """||reference||."""
    norm: float
    """||array||."""
    dot: float
    """Inner product of both."""
    scale: float
    """What the difference is divided by: the reference's norm, or more."""
    max_abs: float
    """The largest absolute difference."""
    nonfinite: int = 0
    """NaN and infinite values of the array."""
    nonfinite_reference: int = 0
    """NaN and infinite values of the reference."""

    @property
    def error(self) -> float:
        """Relative error; infinite where either side has a value that is not finite."""
        if self.nonfinite or self.nonfinite_reference:
            return math.inf
        return _ratio(self.difference_norm, self.scale)

    @property
    def cosine(self) -> float:
        """Cosine similarity; 1 where both are zero, 0 where one is."""
        norms = self.reference_norm * self.norm
        if norms == 0:
            return 1.0 if self.reference_norm == self.norm else 0.0
        return max(-1.0, min(1.0, self.dot / norms))


def compare(actual: NDArray[Any], expected: NDArray[Any], smallest_scale: float = 0.0) -> Comparison:
    """Compare an array with its reference in float64.

    smallest_scale: the least that the difference is divided by. Pixels (uint8) are divided by the norm of a mid-grey
    picture at least, since one grey value more or less is as small in a black picture.

    Arrays of different shapes have an infinite error.
    """
    if actual.shape != expected.shape:
        return Comparison(difference_norm=math.inf, reference_norm=0.0, norm=0.0, dot=0.0, scale=1.0, max_abs=math.inf)
    if expected.dtype == np.uint8:
        smallest_scale = MID_GREY * math.sqrt(expected.size)
    a, b = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    finite_a, finite_b = np.isfinite(a), np.isfinite(b)
    finite = finite_a & finite_b
    if not finite.all():
        a, b = a[finite], b[finite]
    difference = a - b
    reference_norm = float(np.linalg.norm(b))
    return Comparison(
        difference_norm=float(np.linalg.norm(difference)),
        reference_norm=reference_norm,
        norm=float(np.linalg.norm(a)),
        dot=float(a @ b),
        scale=max(reference_norm, smallest_scale),
        max_abs=float(np.abs(difference).max(initial=0.0)),
        nonfinite=int(actual.size - finite_a.sum()),
        nonfinite_reference=int(expected.size - finite_b.sum()),
    )


@dataclass
class ErrorStatistics:
    """Running statistics of many comparisons; calls are counted from 0."""

    calls: int = 0
    error: float = 0.0
    """The largest relative error of any call."""
    worst_call: int = 0
    """The call with that error."""
    cosine: float = 1.0
    """The lowest cosine similarity of any call."""
    max_abs: float = 0.0
    """The largest absolute difference of any call."""
    nonfinite: int = 0
    """NaN and infinite values of all calls."""
    nonfinite_reference: int = 0
    first_nonfinite: int | None = None
    """The first call with such a value."""
    first_nonfinite_reference: int | None = None
    squared_difference: float = 0.0
    """Sum of the squared norms of the differences."""
    squared_reference: float = 0.0
    """Sum of the squared norms of the references."""

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
        self.squared_difference += comparison.difference_norm**2
        self.squared_reference += comparison.reference_norm**2
        self.calls += 1

    @property
    def relative_error(self) -> float:
        """Relative error of the outputs of all calls taken as one vector."""
        if self.nonfinite or self.nonfinite_reference:
            return math.inf
        return _ratio(math.sqrt(self.squared_difference), math.sqrt(self.squared_reference))


def psnr(actual: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB; infinite where they are equal."""
    mean_square = float(np.mean((actual.astype(np.float64) - expected) ** 2))
    return math.inf if mean_square == 0 else 10 * math.log10(255.0**2 / mean_square)


def _ratio(difference: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / scale
