"""Counter-based noise: every draw is a function of (seed, step, draw) alone, so a picture never depends on its
neighbours in the batch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from far_runtime.errors import FarError, SettingName

START, DIFFUSION, ORDER, GUMBEL = range(4)


class NoiseSource(Protocol):
    """What a sampling loop draws from. Arrays are float32 [B, T, C], one row a picture."""

    def start(self, step: int, tokens: int, channels: int) -> NDArray[np.float32]:
        """Start noise of step `step` (the position in the level list)."""

    def diffusion(self, step: int, draw: int, tokens: int, channels: int) -> NDArray[np.float32]:
        """Noise of diffusion step `draw` (counted from 0, the first applied) within step `step`."""

    def orders(self, tokens: int) -> NDArray[np.int64]:
        """Generation order [B, tokens] of each picture, for masked models."""

    def gumbel(self, step: int, tokens: int, vocabulary: int) -> NDArray[np.float32]:
        """Gumbel noise [B, tokens, vocabulary] of step `step`: added to logits, its maximum is a draw from them."""


def random_seed() -> int:
    """A seed that nobody chose; of 53 bits, so that it is exact as a number in JSON and JavaScript."""
    return secrets.randbits(53)


def raw_bits(
    seed: int, purpose: int, step: int, draw: int, count: int, generator: np.random.Philox | None = None
) -> NDArray[np.uint64]:
    """`count` 64-bit words of Philox 4x64, keyed by seed and purpose, at the counter of (step, draw).

    NumPy freezes this stream (it is a published algorithm), unlike the distributions of its Generator. generator: one
    to be used again: to make one takes longer than to draw.
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
    """`count` standard normal numbers of one seed."""
    row: NDArray[np.float32] = normals([seed], purpose, step, draw, count)[0]
    return row


def normals(
    seeds: Sequence[int], purpose: int, step: int, draw: int, count: int, generator: np.random.Philox | None = None
) -> NDArray[np.float32]:
    """Standard normal numbers [seeds, count] by Box and Muller, computed in float64."""
    pairs = (count + 1) // 2
    words = np.empty((2, len(seeds), pairs), np.uint64)  # in contiguous halves, for NumPy's fastest functions
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
    drawn = np.empty((len(seeds), 2 * pairs), np.float32)
    drawn[:, :pairs], drawn[:, pairs:] = radius * np.cos(angle), radius * np.sin(angle)
    return np.ascontiguousarray(drawn[:, :count])


def gumbel(seed: int, step: int, count: int) -> NDArray[np.float32]:
    """`count` standard Gumbel numbers, computed in float64."""
    words = raw_bits(seed, GUMBEL, step, 0, count)
    uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # in (0, 1): both logarithms are finite
    drawn: NDArray[np.float32] = (-np.log(-np.log(uniform))).astype(np.float32)
    return drawn


class SeedNoise:
    """Noise of a batch of pictures, one seed each (0 to 2^64 - 1); FarError for another seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
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
        return np.stack([np.argsort(raw_bits(s, ORDER, 0, 0, tokens), kind="stable") for s in self.seeds])

    def gumbel(self, step: int, tokens: int, vocabulary: int) -> NDArray[np.float32]:
        rows = [gumbel(seed, step, tokens * vocabulary) for seed in self.seeds]
        return np.stack(rows).reshape(-1, tokens, vocabulary)

    def _draw(self, purpose: int, step: int, draw: int, tokens: int, channels: int) -> NDArray[np.float32]:
        drawn = normals(self.seeds, purpose, step, draw, tokens * channels, self._generator)
        return drawn.reshape(-1, tokens, channels)
