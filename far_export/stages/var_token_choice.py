"""VAR's choice of tokens as torch modules: top-k, top-p, and the largest of logits plus Gumbel noise (official
models/helpers.py). All settings are inputs, so that one graph serves them all."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from far_export.stages.stage import Input, Stage
from far_runtime.bundle import TensorSpec

MOST = 3840
"""TensorRT's limit of k in TopK."""


def ascending(x: Tensor) -> Tensor:
    """x sorted along its last axis, the smallest first, with no TopK of more than MOST (up to 2 MOST entries)."""
    count = x.shape[-1]
    smallest = torch.topk(x, min(count, MOST), dim=-1, largest=False, sorted=True)[0]
    if count <= MOST:
        return smallest
    largest = torch.topk(x, count - MOST, dim=-1, sorted=True)[0]
    return torch.cat([smallest, largest.index_select(-1, torch.arange(count - MOST - 1, -1, -1, device=x.device))], -1)


def filtered(logits: Tensor, cut: Tensor, tail: Tensor) -> Tensor:
    """Logits [B, T, V], minus infinity where top-k or top-p leaves a token out.

    cut [1]: how many of the smallest top-k leaves out, V - k (0: none). tail [1]: top-p leaves out the least probable
    tokens whose probabilities add up to no more than it, 1 - p (below 0: none). The most probable token always stays.
    """
    ordered = ascending(logits)
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
        tokens = (filtered(logits, cut, tail) + noise).argmax(-1)
        return tokens, nn.functional.embedding(tokens, self.codebook)


class SmoothStageModule(nn.Module):
    """logits and noise [B, T, V], cut, tail, gain, sharpness [1] -> embeddings [B, T, C], mixed from all codes that are
    left: softmax(sharpness (gain logits + noise)) (`more_smooth` in the official models/var.py)."""

    codebook: Tensor

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.register_buffer("codebook", codebook.detach())

    def forward(
        self, logits: Tensor, noise: Tensor, cut: Tensor, tail: Tensor, gain: Tensor, sharpness: Tensor
    ) -> Tensor:
        left = filtered(logits, cut, tail)
        scores = (logits * gain + noise) * sharpness
        return torch.softmax(scores.masked_fill(left == -math.inf, -math.inf), dim=-1) @ self.codebook


def choose_stage(codebook: Tensor, tokens: tuple[int, int, int]) -> Stage:
    """One token each."""
    vocabulary, channels = codebook.shape
    return Stage(
        stage="choose",
        module=ChooseStageModule(codebook).eval(),
        inputs=_inputs(vocabulary),
        outputs=(
            TensorSpec("tokens", "int64", ("batch", "tokens")),
            TensorSpec("embeddings", "float32", ("batch", "tokens", channels)),
        ),
        profile={"batch": (1, 4, 64), "tokens": tokens},
        fp32_islands=("choose",),
    )


def smooth_stage(codebook: Tensor, tokens: tuple[int, int, int]) -> Stage:
    """A mixture of tokens each."""
    vocabulary, channels = codebook.shape
    return Stage(
        stage="smooth",
        module=SmoothStageModule(codebook).eval(),
        inputs=(*_inputs(vocabulary), Input("gain", (1,)), Input("sharpness", (1,))),
        outputs=(TensorSpec("embeddings", "float32", ("batch", "tokens", channels)),),
        profile={"batch": (1, 4, 64), "tokens": tokens},
        fp32_islands=("smooth",),
        flops={"tokens": 2.0 * vocabulary * channels},
    )


def _inputs(vocabulary: int) -> tuple[Input, ...]:
    logits = ("batch", "tokens", vocabulary)
    return (
        Input("logits", logits), Input("noise", logits), Input("cut", (1,), "int64", vocabulary), Input("tail", (1,)),
    )  # fmt: skip
