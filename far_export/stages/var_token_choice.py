"""VAR's choice of tokens: top-k, top-p, and the largest of logits plus Gumbel noise (official models/helpers.py). All
settings are inputs, so that one graph serves them all."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from far_export.stages.stage import BATCH, Input, Stage
from far_runtime.bundle import TensorSpec

MAX_K = 3840
"""The largest k that TensorRT's TopK takes."""


def sort_ascending(x: Tensor) -> Tensor:
    """x sorted along its last axis, the smallest first, with k at most MAX_K; the axis has up to 2 MAX_K entries."""
    count = x.shape[-1]
    smallest = torch.topk(x, min(count, MAX_K), dim=-1, largest=False, sorted=True)[0]
    if count <= MAX_K:
        return smallest
    largest = torch.topk(x, count - MAX_K, dim=-1, sorted=True)[0]
    return torch.cat([smallest, largest.index_select(-1, torch.arange(count - MAX_K - 1, -1, -1, device=x.device))], -1)


def top_k_top_p_filter(logits: Tensor, cut: Tensor, tail: Tensor) -> Tensor:
    """Logits [B, T, V], minus infinity where top-k or top-p leaves a token out; the most probable token always stays.

    cut: [1], V - k for top-k: so many of the smallest logits are left out, 0 for none.
    tail: [1], 1 - p for top-p: the least probable tokens whose probabilities add up to no more than that are left out;
    below 0 for none.
    """
    ordered = sort_ascending(logits)
    inside = ordered >= ordered.index_select(-1, cut)
    shares = torch.softmax(ordered.masked_fill(~inside, -math.inf), dim=-1).cumsum(-1)
    kept = inside & (shares > tail)
    least = ordered.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
    return logits.masked_fill(logits < torch.minimum(least, ordered[..., -1:]), -math.inf)


class ChooseStageModule(nn.Module):
    """logits and noise [B, T, V], cut [1], tail [1] -> tokens [B, T] and their embeddings [B, T, C]."""

    codebook: Tensor

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook.detach())

    def forward(self, logits: Tensor, noise: Tensor, cut: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        tokens = (top_k_top_p_filter(logits, cut, tail) + noise).argmax(-1)
        return tokens, nn.functional.embedding(tokens, self.codebook)


class SmoothStageModule(nn.Module):
    """logits and noise [B, T, V], cut, tail, gain, sharpness [1] -> embeddings [B, T, C], mixed from the codes of all
    tokens that the filters leave: softmax(sharpness (gain logits + noise)) (`more_smooth`, official models/var.py)."""

    codebook: Tensor

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook.detach())

    def forward(
        self, logits: Tensor, noise: Tensor, cut: Tensor, tail: Tensor, gain: Tensor, sharpness: Tensor
    ) -> Tensor:
        left = top_k_top_p_filter(logits, cut, tail)
        scores = (logits * gain + noise) * sharpness
        return torch.softmax(scores.masked_fill(left == -math.inf, -math.inf), dim=-1) @ self.codebook


def choose_stage(codebook: Tensor, tokens: tuple[int, int, int]) -> Stage:
    """Chooses a token for every position."""
    vocabulary, channels = codebook.shape
    return Stage(
        stage="choose",
        module=ChooseStageModule(codebook).eval(),
        inputs=_inputs(vocabulary),
        outputs=(
            TensorSpec("tokens", "int64", ("batch", "tokens")),
            TensorSpec("embeddings", "float32", ("batch", "tokens", channels)),
        ),
        profile={"batch": BATCH, "tokens": tokens},
        fp32_islands=("choose",),
    )


def smooth_stage(codebook: Tensor, tokens: tuple[int, int, int]) -> Stage:
    """Mixes the codes of several tokens for every position."""
    vocabulary, channels = codebook.shape
    return Stage(
        stage="smooth",
        module=SmoothStageModule(codebook).eval(),
        inputs=(*_inputs(vocabulary), Input("gain", (1,)), Input("sharpness", (1,))),
        outputs=(TensorSpec("embeddings", "float32", ("batch", "tokens", channels)),),
        profile={"batch": BATCH, "tokens": tokens},
        fp32_islands=("smooth",),
        flops={"tokens": 2.0 * vocabulary * channels},
    )


def _inputs(vocabulary: int) -> tuple[Input, ...]:
    logits = ("batch", "tokens", vocabulary)
    return (
        Input("logits", logits), Input("noise", logits), Input("cut", (1,), "int64", vocabulary), Input("tail", (1,)),
    )  # fmt: skip
