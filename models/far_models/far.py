"""FAR for class labels: the transformer that reads low-passed latents and conditions the diffusion head (official
models/far.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from far_models.blocks import Block, fill_gaps, take_tokens
from far_models.head import DiffLoss


@dataclass(frozen=True)
class FARConfig:
    """Sizes and variant of a FAR model."""

    grid: int = 16
    """Side of the latents [B, channels, grid, grid]; one token per cell, levels from 0 to grid - 1."""
    channels: int = 16
    classes: int = 1000
    """Class labels; the label `classes` is the null class."""
    buffer: int = 64
    """Tokens before the picture's, which hold the class embedding."""
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_width: int = 768
    decoder_depth: int = 12
    decoder_heads: int = 12
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, as a multiple of the block's width."""
    head_width: int = 1024
    head_depth: int = 6
    masked: bool = False
    """Whether the encoder sees only part of the tokens."""
    prediction: str = "epsilon"
    """What the head predicts: "epsilon" (official) or "v"."""
    latent_scale: float = 0.2325
    """Factor of the VAE's latents."""
    filter: str = "spatial"
    """The low-pass filter, a key of far_runtime.sampling.lowpass.FILTERS."""

    @property
    def tokens(self) -> int:
        """Tokens of one picture: grid x grid."""
        return self.grid * self.grid


PRESETS: dict[str, FARConfig] = {
    "far_base": FARConfig(),
    "far_large": FARConfig(
        encoder_width=1024, encoder_depth=16, encoder_heads=16, decoder_width=1024, decoder_depth=16, decoder_heads=16,
        head_depth=3, head_width=1536,
    ),
    "far_huge": FARConfig(
        encoder_width=1280, encoder_depth=20, encoder_heads=16, decoder_width=1280, decoder_depth=20, decoder_heads=16,
        head_depth=3,
    ),
}  # fmt: skip


def preset(name: str, **changes: object) -> FARConfig:
    """The named preset (far_base, far_large, far_huge) with some fields changed; KeyError for another name."""
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]


class FAR(nn.Module):
    """Encoder over the buffer and the visible tokens, decoder over all tokens, and the diffusion head.

    `features` computes z [B, L, decoder_width], from which `diffloss.net` draws the next latents. Parameters have the
    official names, so that `load_state_dict` takes an official checkpoint. levels=False: MAR, whose head has no level.
    """

    def __init__(self, config: FARConfig, dropout: float = 0.0, levels: bool = True) -> None:
        super().__init__()
        self.config = config
        c, length = config, config.tokens
        self.class_emb = nn.Embedding(c.classes, c.encoder_width)
        self.fake_latent = nn.Parameter(torch.zeros(1, c.encoder_width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_width))
        self.z_proj = nn.Linear(c.channels, c.encoder_width)
        self.z_proj_ln = nn.LayerNorm(c.encoder_width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length + c.buffer, c.encoder_width))
        self.encoder_blocks = nn.ModuleList(
            Block(c.encoder_width, c.encoder_heads, round(c.encoder_width * c.mlp_ratio), dropout)
            for _ in range(c.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(c.encoder_width, eps=1e-6)
        self.decoder_embed = nn.Linear(c.encoder_width, c.decoder_width)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length + c.buffer, c.decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(c.decoder_width, c.decoder_heads, round(c.decoder_width * c.mlp_ratio), dropout)
            for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(c.decoder_width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, length, c.decoder_width))
        self.diffloss = DiffLoss(c.channels, c.decoder_width, c.head_width, c.head_depth, levels)

    def class_embedding(self, labels: Tensor) -> Tensor:
        """Class embeddings [B, encoder_width] of labels [B]; the null class has `fake_latent`."""
        table = torch.cat([self.class_emb.weight, self.fake_latent])
        return table[labels]

    def features(
        self,
        latents: Tensor | None,
        class_embedding: Tensor,
        visible: Tensor | None = None,
        restore: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor:
        """Decoder output z [B, L, decoder_width].

        latents [B, L, C]: low-passed; None in the masked variant where no token is visible.
        class_embedding [B, encoder_width].
        visible [B, V]: positions of the tokens that the encoder sees; None for all.
        restore [B, L]: for every position its index in `visible`, or V where it is masked.
        predicted [B, T]: compute z at these positions alone, [B, T, decoder_width].
        """
        buffer, positions = self.config.buffer, self.diffusion_pos_embed_learned
        x = self.encode(latents, class_embedding, visible)
        if predicted is None:
            return self.decode(x, restore, all_masked=latents is None)[:, buffer:] + positions
        z = self.decode(x, restore, all_masked=latents is None, predicted=predicted + buffer)
        return z + take_tokens(positions.expand(len(predicted), -1, -1), predicted)

    def encode(self, latents: Tensor | None, class_embedding: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encoder output [B, buffer + V, encoder_width]; V = L where `visible` is None, 0 where `latents` is."""
        buffer = self.config.buffer
        position = self.encoder_pos_embed_learned
        # The buffer: the class embedding at its own positions [B, buffer, encoder_width].
        x = self.z_proj_ln(class_embedding.unsqueeze(1) + position[:, :buffer])
        if latents is not None:
            tokens = self.z_proj_ln(self.z_proj(latents) + position[:, buffer:])
            if visible is not None:
                tokens = take_tokens(tokens, visible)
            x = torch.cat([x, tokens], dim=1)
        for block in self.encoder_blocks:
            x = block(x)
        out: Tensor = self.encoder_norm(x)
        return out

    def decode(
        self, x: Tensor, restore: Tensor | None = None, all_masked: bool = False, predicted: Tensor | None = None
    ) -> Tensor:
        """Decoder output [B, buffer + L, decoder_width] of the encoder's output x [B, buffer + V, encoder_width].

        With `restore` or `all_masked`, mask tokens take the places of the tokens that are not visible.
        predicted [B, T]: compute these positions alone (the buffer's come first), [B, T, decoder_width].
        """
        buffer = self.config.buffer
        x = self.decoder_embed(x)
        if restore is not None:
            x = torch.cat([x[:, :buffer], fill_gaps(x[:, buffer:], self.mask_token, restore)], dim=1)
        elif all_masked:
            x = torch.cat([x, self.mask_token.expand(x.shape[0], self.config.tokens, -1)], dim=1)
        x = x + self.decoder_pos_embed_learned
        # All blocks but the last need every token for their attention.
        last = len(self.decoder_blocks) - 1
        for i, block in enumerate(self.decoder_blocks):
            x = block(x, predicted if i == last else None)
        out: Tensor = self.decoder_norm(x)
        return out

    def initialize(self) -> FAR:
        """Official initialisation (Xavier linears, N(0, 0.02) embeddings and positions); returns self."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = [self.class_emb.weight, self.fake_latent, self.encoder_pos_embed_learned, self.mask_token]
        for table in [*tables, self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned]:
            nn.init.normal_(table, std=0.02)
        self.diffloss.net.initialize()
        return self


def restore_indices(visible: Tensor, length: int) -> Tensor:
    """For every position [B, L] its index in visible [B, V], or V where it is masked."""
    batch, count = visible.shape
    restore = torch.full((batch, length), count, dtype=torch.int64, device=visible.device)
    return restore.scatter(1, visible, torch.arange(count, device=visible.device).expand(batch, -1))


def grid_of(tokens: int) -> int:
    """Side of the square grid with this number of tokens; ValueError where it is not a square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens do not form a square grid")
    return side
