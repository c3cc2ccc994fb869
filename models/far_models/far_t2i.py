"""FAR-T2I, text to image: FAR's masked transformer with cross-attention to the prompt's features in every block
(official models/far_t2i.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from far_models.blocks import attend, fill_gaps, take_tokens
from far_models.head import DiffLoss


@dataclass(frozen=True)
class FART2IConfig:
    """Sizes of a FAR-T2I model; fields without a description are FARConfig's."""

    grid: int = 16
    channels: int = 16
    context_tokens: int = 300
    """Text tokens of every prompt."""
    context_width: int = 1536
    """Width of the text encoder's features."""
    encoder_width: int = 1024
    encoder_depth: int = 16
    encoder_heads: int = 16
    decoder_width: int = 1024
    decoder_depth: int = 16
    decoder_heads: int = 16
    head_dim: int = 64
    """Width of one attention head; heads x head_dim is the inner width of attention."""
    mlp_ratio: float = 4.0
    head_width: int = 1024
    head_depth: int = 3
    prediction: str = "epsilon"
    latent_scale: float = 0.2325

    @property
    def tokens(self) -> int:
        """Tokens of one picture: grid x grid."""
        return self.grid * self.grid


class CrossAttention(nn.Module):
    """Multi-head attention from x [B, L, width] to context [B, T, context_width], inside heads x head_dim wide."""

    def __init__(self, width: int, context_width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(context_width, inner)
        self.to_v = nn.Linear(context_width, inner)
        self.to_out = nn.Sequential(nn.Linear(inner, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (self._split(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out: Tensor = self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, heads x head_dim] -> [B, heads, L, head_dim]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TanhGelu(nn.Module):
    """Linear, then GELU by its tanh approximation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, GELU, Linear under the names net.0.proj and net.2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(TanhGelu(width, hidden), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class CrossBlock(nn.Module):
    """Pre-norm block over x [B, L, width]: self-attention, cross-attention to the context [B, T, context_width], MLP.

    It is diffusers' BasicTransformerBlock, which the official code uses, with its parameter names.
    """

    def __init__(self, width: int, context_width: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=1e-5, elementwise_affine=False) for _ in range(3))
        self.attn1 = CrossAttention(width, width, heads, head_dim)
        self.attn2 = CrossAttention(width, context_width, heads, head_dim)
        self.ff = FeedForward(width, hidden)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class FART2I(nn.Module):
    """Encoder over the visible tokens, decoder over all tokens, both attending to the prompt, and the diffusion head.

    `features` computes z [B, L, decoder_width] under the `context` of a prompt, from which `diffloss.net` draws the
    next latents. Parameters have the official names.
    """

    def __init__(self, config: FART2IConfig) -> None:
        super().__init__()
        self.config = config
        c, length, width, inner = config, config.tokens, config.encoder_width, config.decoder_width
        self.context_embed = nn.Linear(c.context_width, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, c.context_tokens, width))
        self.z_proj = nn.Linear(c.channels, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.encoder_blocks = nn.ModuleList(
            CrossBlock(width, width, c.encoder_heads, c.head_dim, round(width * c.mlp_ratio))
            for _ in range(c.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, inner))
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(inner, width, c.decoder_heads, c.head_dim, round(inner * c.mlp_ratio))
            for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(inner, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, length, inner))
        self.diffloss = DiffLoss(c.channels, inner, c.head_width, c.head_depth)

    def context(self, features: Tensor, null: Tensor) -> Tensor:
        """Context [B, T, encoder_width] of text features [B, T, context_width]; the learned null condition for pictures
        whose `null` [B] is not 0."""
        return torch.where(null.bool()[:, None, None], self.fake_latent, self.context_embed(features))

    def features(
        self, latents: Tensor | None, context: Tensor, visible: Tensor | None = None, restore: Tensor | None = None
    ) -> Tensor:
        """Decoder output z [B, L, decoder_width].

        latents [B, L, C]: low-passed; None where no token is visible, which leaves out the encoder.
        context [B, T, encoder_width].
        visible [B, V]: positions of the tokens that the encoder sees; None for all.
        restore [B, L]: for every position its index in `visible`, or V where it is masked.
        """
        if latents is None:
            x = self.mask_token.expand(context.shape[0], self.config.tokens, -1)
        else:
            x = self.decoder_embed(self.encode(latents, context, visible))
            if restore is not None:
                x = fill_gaps(x, self.mask_token, restore)
        x = x + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x, context)
        z: Tensor = self.decoder_norm(x) + self.diffusion_pos_embed_learned
        return z

    def encode(self, latents: Tensor, context: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encoder output [B, V, encoder_width]; V = L where `visible` is None."""
        x = self.z_proj_ln(self.z_proj(latents) + self.encoder_pos_embed_learned)
        if visible is not None:
            x = take_tokens(x, visible)
        for block in self.encoder_blocks:
            x = block(x, context)
        out: Tensor = self.encoder_norm(x)
        return out

    def initialize(self) -> FART2I:
        """Official initialisation (Xavier linears, N(0, 0.02) tables); returns self."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = [self.fake_latent, self.mask_token, self.encoder_pos_embed_learned]
        for table in [*tables, self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned]:
            nn.init.normal_(table, std=0.02)
        self.diffloss.net.initialize()
        return self
