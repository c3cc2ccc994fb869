"""Qwen2's language model with Hugging Face's parameter names; Qwen2-VL's is the same network.

For text alone the three parts of Qwen2-VL's rotary positions are equal, so that they are plain rotary positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from far_models.islands import island, softmax


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes of a Qwen2."""

    vocabulary: int
    """Token ids."""
    width: int
    depth: int
    heads: int
    groups: int
    """Heads of keys and values, each shared by heads / groups query heads."""
    head_dim: int
    """Width of one head."""
    hidden: int
    """Hidden width of the MLPs."""
    positions: int
    """The largest number of tokens of a text."""
    theta: float = 1e6
    """Base of the rotary positions."""
    eps: float = 1e-6
    """Of the norms."""


class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, computed in float32 at every precision, times a gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Qwen2Attention(nn.Module):
    """Grouped-query attention with rotary positions over x [B, n, width].

    rotary: cosines and sines [n, head_dim] of the positions. allowed: attention mask, broadcast to
    [B, groups, heads / groups, n, n].
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        width, d = config.width, config.head_dim
        self.q_proj = nn.Linear(width, config.heads * d)
        self.k_proj = nn.Linear(width, config.groups * d)
        self.v_proj = nn.Linear(width, config.groups * d)
        self.o_proj = nn.Linear(config.heads * d, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], allowed: Tensor) -> Tensor:
        groups, d = self.config.groups, self.config.head_dim
        # [B, groups, heads / groups, n, d], with one head of keys and values per group.
        q = self.q_proj(x).unflatten(-1, (groups, -1, d)).permute(0, 2, 3, 1, 4)
        k, v = (y.unflatten(-1, (groups, 1, d)).permute(0, 2, 3, 1, 4) for y in (self.k_proj(x), self.v_proj(x)))
        attended = attend_allowed(rotate(q, *rotary), rotate(k, *rotary), v, allowed)
        out: Tensor = self.o_proj(attended.permute(0, 3, 1, 2, 4).flatten(2))
        return out


class Qwen2Mlp(nn.Module):
    """SwiGLU over [B, n, width]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Qwen2Layer(nn.Module):
    """Pre-norm transformer layer over [B, n, width]."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = Qwen2Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = Qwen2Mlp(config.width, config.hidden)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], allowed: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, allowed)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Qwen2(nn.Module):
    """Token ids and mask [B, n] -> last hidden states [B, n, width], after the norm.

    A token attends to itself and to the tokens before it, except those whose mask is 0.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Qwen2Layer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.eps)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        allowed = (positions[:, None] >= positions) & (mask != 0)[:, None, None, None, :]
        x: Tensor = self.embed_tokens(ids)
        rotary = rotation(positions, self.config.head_dim, self.config.theta, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, allowed)
        out: Tensor = self.norm(x)
        return out


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, head_dim] of rotary positions [n], computed in float32."""
    island("rotation")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return torch.cos(angles).to(dtype), torch.sin(angles).to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [..., n, d] with its halves rotated by the angles of their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


MASKED_SCORE = -30000.0
"""Attention score of a masked token: its weight underflows to exactly 0, and FP16 can hold the score."""


def attend_allowed(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Scaled dot-product attention of [..., n, d] tensors, with a boolean attention mask broadcast to [..., n, n]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return softmax(scores.masked_fill(~allowed, MASKED_SCORE)) @ v
