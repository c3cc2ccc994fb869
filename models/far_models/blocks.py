"""Transformer blocks of FAR and MAR, with timm's parameter names (norm1, attn.qkv, attn.proj, norm2, mlp.fc1,
mlp.fc2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from far_models.islands import softmax


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention of [B, heads, L, d] tensors.

    On the CPU and in exported graphs it is written out: it is as fast there, and every engine recognises the pattern.
    Elsewhere PyTorch's fused kernels compute it.
    """
    if q.is_cuda and not torch.compiler.is_exporting():
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    weights = softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1))
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    return weights @ v


class Attention(nn.Module):
    """Multi-head self-attention over [B, L, width]."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """The output of all tokens [B, L, width], or of those at the positions [B, n] alone [B, n, width]."""
        _, length, width = x.shape
        # Each [B, heads, L, d].
        q, k, v = self.qkv(x).reshape(-1, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if positions is not None:
            length = positions.shape[1]
            q = q.gather(2, positions[:, None, :, None].expand(-1, self.heads, -1, q.shape[-1]))
        x = attend(q, k, v, self.dropout if self.training else 0.0)
        x = self.proj(x.transpose(1, 2).reshape(-1, length, width))
        return nn.functional.dropout(x, self.dropout, self.training)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear over [B, L, width]."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(nn.functional.gelu(self.fc1(x)), self.dropout, self.training)
        return nn.functional.dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block over [B, L, width], as timm's, which the official code uses."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden, dropout)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """The output of all tokens [B, L, width], or of those at the positions [B, n] alone [B, n, width], for the last
        block of a network."""
        out = self.attn(self.norm1(x), positions)
        x = out + (x if positions is None else take_tokens(x, positions))
        return x + self.mlp(self.norm2(x))


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens [B, n, width] at the positions `index` [B, n] of tokens [B, L, width]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def fill_gaps(visible: Tensor, mask_token: Tensor, restore: Tensor) -> Tensor:
    """All tokens [B, L, width] from the visible ones [B, V, width] and the mask token [1, 1, width].

    restore [B, L]: for every position its index among the visible tokens, or V for the mask token.
    """
    return take_tokens(torch.cat([visible, mask_token.expand(visible.shape[0], -1, -1)], dim=1), restore)
