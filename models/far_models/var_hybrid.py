"""The hybrids between VAR and FAR that FAR's article compares with: next-scale prediction whose tokens are continuous
and come from a diffusion head, with and without residuals between the scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from far_models.head import DiffLoss
from far_models.var import VAR, Cache, VARConfig
from far_runtime.sampling.pyramid import SCALES_256, resize_tables, token_ranges


@dataclass(frozen=True)
class VARHybridConfig:
    """Sizes of a hybrid. residual: a scale's map is what the coarser ones leave of the latents; otherwise it is the
    latents themselves, shrunk to that scale. What is not named here means what it means in VARConfig or FARConfig."""

    patch_nums: tuple[int, ...] = SCALES_256
    channels: int = 16
    classes: int = 1000
    width: int = 1024
    depth: int = 16
    heads: int = 16
    mlp_ratio: float = 4.0
    head_width: int = 1024
    head_depth: int = 6
    residual: bool = True
    prediction: str = "epsilon"
    latent_scale: float = 0.2325

    @property
    def tokens(self) -> int:
        """Tokens of all scales."""
        return sum(side * side for side in self.patch_nums)

    @property
    def grid(self) -> int:
        """Side of the latents."""
        return self.patch_nums[-1]


class VARHybrid(nn.Module):
    """VAR's transformer, whose output conditions FAR's diffusion head instead of a choice among codes.

    Latents are [B, cells, C], all scales' tokens together [B, L, C]. gain [scales]: what brings each scale's tokens to
    deviation 1. `initialize` is done in here.
    """

    up: Tensor
    down: Tensor
    gain: Tensor

    def __init__(self, config: VARHybridConfig) -> None:
        super().__init__()
        self.config = config
        sizes = VARConfig(
            patch_nums=config.patch_nums,
            channels=config.channels,
            vocabulary=1,
            classes=config.classes,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
        )
        self.var = VAR(sizes).initialize()
        self.var.head = nn.Identity()
        self.head = DiffLoss(config.channels, config.width, config.head_width, config.head_depth)
        self.head.net.initialize()
        self.ranges = token_ranges(config.patch_nums)
        for name, table in zip(("up", "down"), resize_tables(config.patch_nums), strict=True):
            self.register_buffer(name, torch.from_numpy(table.copy()), persistent=False)
        self.register_buffer("gain", torch.ones(len(config.patch_nums)))

    @property
    def diffloss(self) -> DiffLoss:
        """The head by the name that it has in FAR."""
        return self.head

    def grown(self, scale: int, tokens: Tensor, latents: Tensor) -> Tensor:
        """The latents [B, cells, C] so far after a scale's tokens [B, T, C] (gain undone here), given those before."""
        start, end = self.ranges[scale]
        added = self.up[start:end].T @ (tokens / self.gain[scale])
        return latents + added if self.config.residual else added

    def maps(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing: the tokens [B, L, C] of all scales, and the inputs [B, L - first, C] of all but the
        first."""
        targets, inputs, state = [], [], torch.zeros_like(latents)
        for scale, (start, end) in enumerate(self.ranges):
            if scale:
                inputs.append(self.down[start:end] @ state)
            wanted = latents - state if self.config.residual else latents
            targets.append(self.gain[scale] * (self.down[start:end] @ wanted))
            state = self.grown(scale, targets[-1], state)
        return torch.cat(targets, dim=1), torch.cat([latents[:, :0], *inputs], dim=1)

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Set the gains by example latents [B, cells, C]."""
        self.gain.fill_(1)
        targets, _ = self.maps(latents)
        self.gain.copy_(torch.stack([1 / targets[:, start:end].std().clamp(min=1e-4) for start, end in self.ranges]))

    def condition(self, z: Tensor, scales: Tensor) -> Tensor:
        """Head condition [B, T, head width] of z [B, T, width] and each token's scale number [T]."""
        return self.head.net.condition(z, scales.unsqueeze(-1))

    def scale_numbers(self) -> Tensor:
        """The scale number [L] of every token."""
        parts = [torch.full((end - start,), scale) for scale, (start, end) in enumerate(self.ranges)]
        return torch.cat(parts).to(self.gain.device)

    @torch.no_grad()
    def generate(self, labels: Tensor, denoise: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Latents [B, cells, C] drawn scale by scale.

        labels [rows]: of the pictures, or (guided) those and then as many null labels. denoise(scale, condition
        [rows, T, head width]) draws the scale's tokens [B, T, C].
        """
        var, rows = self.var, len(labels)
        embedding = var.class_emb(labels)
        modulation, of_head = var.modulations(embedding)
        x = var.first_input(embedding)
        caches: list[Cache | None] = [None] * self.config.depth
        latents = self.gain.new_zeros(1)
        for scale, (start, end) in enumerate(self.ranges):
            if scale:
                shrunk = var.word_embed(self.down[start:end] @ latents)
                x = (shrunk + var.positions()[start:end]).repeat(rows // len(shrunk), 1, 1)
            x, caches = self._blocks(x, modulation, caches)
            numbers = torch.full((end - start,), scale, device=x.device)
            tokens = denoise(scale, self.condition(var.head_nm(x, of_head), numbers))
            latents = self.grown(scale, tokens, latents)
        return latents

    def _blocks(self, x: Tensor, modulation: Tensor, caches: list[Cache | None]) -> tuple[Tensor, list[Cache | None]]:
        grown: list[Cache | None] = []
        for i, (block, past) in enumerate(zip(self.var.blocks, caches, strict=True)):
            x, cache = block(x, modulation[:, i], past)
            grown.append(cache)
        return x, grown
