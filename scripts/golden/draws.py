"""Weights and noise of a golden case, generated from their names, and functions for the checks of all cases."""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from far_export.compare import compare

TABLES = {"class_emb", "lvl_embed", "embedding"}


def stream(name: str, seed: int = 0) -> np.random.RandomState:
    """The random stream of a name. NumPy guarantees that RandomState never changes (NEP 19)."""
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)


def weight(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The parameter of that name: gains 1 + 0.1 n, biases 0.1 n, matrices n / sqrt(fan-in) (a twentieth for the
    head's output), tables 0.5 n."""
    n = noise(name, shape, seed)
    module, _, leaf = name.rpartition(".")
    if leaf == "weight" and len(shape) == 1:
        return 1 + np.float32(0.1) * n
    if leaf == "bias":
        return np.float32(0.1) * n
    if leaf == "weight" and module.rpartition(".")[2] not in TABLES:
        gain = 0.05 if "final_layer.linear" in name else 1.0
        return n * np.float32(gain / np.sqrt(np.prod(shape[1:])))
    return np.float32(0.5) * n


def noise(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Standard normal noise of that name."""
    return stream(name, seed).standard_normal(shape).astype(np.float32)


class NamedNoise:
    """The noise of a golden case, numbered in the order in which the official sampler asks for it.

    A step with S diffusion steps asks for one start noise [N, C] and S draws [2 N, C], of which the first half is used.
    """

    def __init__(self, batch: int, steps: tuple[int, ...], seed: int) -> None:
        self.batch, self.seed = batch, seed
        self.first = np.concatenate([[0], np.cumsum([1 + count for count in steps])])

    def start(self, step: int, tokens: int, channels: int) -> NDArray[np.float32]:
        return self._draw(step, 0, 1, tokens, channels)

    def diffusion(self, step: int, draw: int, tokens: int, channels: int) -> NDArray[np.float32]:
        return self._draw(step, 1 + draw, 2, tokens, channels)

    def orders(self, tokens: int) -> NDArray[np.int64]:
        permutations = [stream(f"order_{i:04d}", self.seed).permutation(tokens) for i in range(self.batch)]
        return np.stack(permutations).astype(np.int64)

    def _draw(self, step: int, draw: int, halves: int, tokens: int, channels: int) -> NDArray[np.float32]:
        count = self.batch * tokens
        drawn = noise(f"draw_{self.first[step] + draw:04d}", (halves * count, channels), self.seed)
        return drawn[:count].reshape(self.batch, tokens, channels)


def relative_error(a: NDArray[Any], b: NDArray[Any]) -> float:
    """||a - b|| / ||b||; infinite where either is not finite or the shapes differ."""
    return compare(a, b).error


def save_checkpoint(case: dict[str, Any], path: Path, key: str) -> None:
    """Save the case's weights as the official code does: a state dict under `key`, and the training arguments."""
    seed = case["seed"]
    tensors = {n: torch.from_numpy(weight(n, tuple(shape), seed)) for n, shape in case["parameters"].items()}
    torch.save({key: tensors, "args": argparse.Namespace(mask=case.get("mask", False))}, path)
