"""Counter-based noise: it depends on seed, step and draw alone, so that a picture never depends on the others of its
batch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from far_runtime.errors import FarError, SettingName

START, DIFFUSION, ORDER, GUMBEL = range(4)
"""What noise is drawn for, a part of the generator's key."""


class NoiseSource(Protocol):
    """The random numbers of a sampling loop, with one row per picture of the batch."""

    def start(self, step: int, tokens: int, channels: int) -> NDArray[np.float32]:
        """Noise [B, tokens, channels] that the diffusion of step `step` of the plan starts from."""

    def diffusion(self, step: int, draw: int, tokens: int, channels: int) -> NDArray[np.float32]:
        """Noise [B, tokens, channels] that diffusion step `draw` of step `step` adds; both are counted from 0."""

    def orders(self, tokens: int) -> NDArray[np.int64]:
        """The order [B, tokens] of each picture's tokens, for masked models."""

    def gumbel(self, step: int, tokens: int, vocabulary: int) -> NDArray[np.float32]:
        """Gumbel noise [B, tokens, vocabulary] of step `step`; the largest sum of logit and noise is a draw."""


def random_seed() -> int:
    """A random seed of 53 bits, which JSON and JavaScript represent exactly."""
    return secrets.randbits(53)


def raw_bits(
    seed: int, purpose: int, step: int, draw: int, count: int, generator: np.random.Philox | None = None
) -> NDArray[np.uint64]:
    """`count` 64-bit words of Philox 4x64, with seed and purpose as its key and step and draw as its counter.

    NumPy never changes this stream, unlike the distributions of its Generator. A `generator` may be passed to be used
    again, since making one takes longer than drawing.
    """
    generator = generator or np.random.Philox(0)
    generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": np.array([0, draw, step, 0], np.uint64), "key": np.array([seed, purpose], np.uint64)},
        "buffer": np.zeros(4, np.uint64),
        "buffer_pos": 4,  # empty
        "has_uint32": 0,
        "uinteger": 0,
    }
    words: NDArray[np.uint64] = generator.random_raw(count)
    return words


def normal(seed: int, purpose: int, step: int, draw: int, count: int) -> NDArray[np.float32]:
    """`count` standard normal numbers from one seed."""
    row: NDArray[np.float32] = normals([seed], purpose, step, draw, count)[0]
    return row


def normals(
    seeds: Sequence[int], purpose: int, step: int, draw: int, count: int, generator: np.random.Philox | None = None
) -> NDArray[np.float32]:
    """Standard normal numbers [seeds, count] by the Box-Muller transform in float64; parameters as of `raw_bits`."""
    pairs = (count + 1) // 2
    words = np.empty((2, len(seeds), pairs), np.uint64)  # contiguous halves, for NumPy's fastest loops
    for row, seed in enumerate(seeds):
        words[:, row] = raw_bits(seed, purpose, step, draw, 2 * pairs, generator).reshape(2, pairs)
    words >>= np.uint64(11)
    uniform = words.astype(np.float64)
    uniform += 1.0
    uniform *= 2.0**-53  # in (0, 1]: the logarithm is finite
    radius, angle = np.log(uniform[0], out=uniform[0]), uniform[1]
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle *= 2.0 * np.pi
    numbers = np.empty((len(seeds), 2 * pairs), np.float32)
    numbers[:, :pairs], numbers[:, pairs:] = radius * np.cos(angle), radius * np.sin(angle)
    return np.ascontiguousarray(numbers[:, :count])


def gumbel(seed: int, step: int, count: int) -> NDArray[np.float32]:
    """`count` standard Gumbel numbers from one seed, computed in float64."""
    words = raw_bits(seed, GUMBEL, step, 0, count)
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # in (0, 1): both logarithms are finite
    numbers: NDArray[np.float32] = (-np.log(-np.log(uniform))).astype(np.float32)
    return numbers


class SeedNoise:
    """Noise of a batch of pictures, each with its own seed from 0 to 2^64 - 1."""

    def __init__(self, seeds: Sequence[int]) -> None:
        """FarError for a seed that is out of range."""
        for seed in seeds:
            if not 0 <= seed < 2**64:
                raise FarError(
                    f"seed {seed}: expected 0 to 18446744073709551615; use ", SettingName("seed"), " with such a number"
                )
        self.seeds = tuple(seeds)
        self._generator = np.random.Philox(0)

    def start(self, step: int, tokens: int, channels: int) -> NDArray[np.float32]:
        return self._draw(START, step, 0, tokens, channels)

    def diffusion(self, step: int, draw: int, tokens: int, channels: int) -> NDArray[np.float32]:
        return self._draw(DIFFUSION, step, draw, tokens, channels)

    def orders(self, tokens: int) -> NDArray[np.int64]:
        return np.stack([np.argsort(raw_bits(seed, ORDER, 0, 0, tokens), kind="stable") for seed in self.seeds])

    def gumbel(self, step: int, tokens: int, vocabulary: int) -> NDArray[np.float32]:
        rows = [gumbel(seed, step, tokens * vocabulary) for seed in self.seeds]
        return np.stack(rows).reshape(-1, tokens, vocabulary)

    def _draw(self, purpose: int, step: int, draw: int, tokens: int, channels: int) -> NDArray[np.float32]:
        numbers = normals(self.seeds, purpose, step, draw, tokens * channels, self._generator)
        return numbers.reshape(-1, tokens, channels)
