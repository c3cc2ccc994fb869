"""The hybrids of VAR and FAR that FAR's article compares with: next-scale prediction of continuous tokens, drawn from a
diffusion head, with and without residuals between the scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from far_models.head import DiffLoss
from far_models.var import VAR, KeyValueCache, VARConfig
from far_runtime.sampling.pyramid import SCALES_256, resize_tables, token_ranges


@dataclass(frozen=True)
class VARHybridConfig:
    """Sizes and variant of a hybrid; fields without a description are VARConfig's or FARConfig's."""

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
    """Whether a scale's tokens are what the coarser scales leave of the latents; else they are the resized latents."""
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
    """VAR's transformer, whose output conditions FAR's diffusion head in place of logits over codes.

    Latents are [B, cells, C], the tokens of all scales [B, L, C]. A new module is initialised already.
    """

    up: Tensor
    """Resizes from every scale to the cells [L, cells]."""
    down: Tensor
    """Resizes from the cells to every scale [L, cells]."""
    gain: Tensor
    """Factor of every scale's tokens [scales], which gives them a standard deviation of 1."""

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
        """The head under its name in FAR."""
        return self.head

    def add_scale(self, scale: int, tokens: Tensor, latents: Tensor) -> Tensor:
        """The latents [B, cells, C] after a scale's tokens [B, T, C], from the latents before it."""
        start, end = self.ranges[scale]
        added = self.up[start:end].T @ (tokens / self.gain[scale])
        return latents + added if self.config.residual else added

    def targets_and_inputs(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of all scales [B, L, C] and the inputs of all scales but the first [B, L - first_tokens, C], for
        teacher forcing."""
        targets, inputs, state = [], [], torch.zeros_like(latents)
        for scale, (start, end) in enumerate(self.ranges):
            if scale:
                inputs.append(self.down[start:end] @ state)
            target = latents - state if self.config.residual else latents
            targets.append(self.gain[scale] * (self.down[start:end] @ target))
            state = self.add_scale(scale, targets[-1], state)
        return torch.cat(targets, dim=1), torch.cat([latents[:, :0], *inputs], dim=1)

    @torch.no_grad()
    def set_gain(self, latents: Tensor) -> None:
        """Measure the gains on example latents [B, cells, C]."""
        self.gain.fill_(1)
        targets, _ = self.targets_and_inputs(latents)
        self.gain.copy_(torch.stack([1 / targets[:, start:end].std().clamp(min=1e-4) for start, end in self.ranges]))

    def condition(self, z: Tensor, scales: Tensor) -> Tensor:
        """Head condition [B, T, head_width] of z [B, T, width] and each token's scale number [T]."""
        return self.head.net.condition(z, scales.unsqueeze(-1))

    def scale_numbers(self) -> Tensor:
        """The scale number [L] of every token."""
        parts = [torch.full((end - start,), scale) for scale, (start, end) in enumerate(self.ranges)]
        return torch.cat(parts).to(self.gain.device)

    @torch.no_grad()
    def generate(self, labels: Tensor, denoise: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Draw latents [B, cells, C] scale by scale.

        labels [rows]: one per picture; with guidance those and then as many null labels.
        denoise: draws tokens [B, T, C] from the scale's number and the head condition [rows, T, head_width].
        """
        var, rows = self.var, len(labels)
        embedding = var.class_emb(labels)
        modulation, head_modulation = var.modulations(embedding)
        x = var.first_input(embedding)
        caches: list[KeyValueCache | None] = [None] * self.config.depth
        latents = self.gain.new_zeros(1)
        for scale, (start, end) in enumerate(self.ranges):
            if scale:
                resized = var.word_embed(self.down[start:end] @ latents)
                x = (resized + var.positions()[start:end]).repeat(rows // len(resized), 1, 1)
            x, caches = self._blocks(x, modulation, caches)
            numbers = torch.full((end - start,), scale, device=x.device)
            tokens = denoise(scale, self.condition(var.head_nm(x, head_modulation), numbers))
            latents = self.add_scale(scale, tokens, latents)
        return latents

    def _blocks(
        self, x: Tensor, modulation: Tensor, caches: list[KeyValueCache | None]
    ) -> tuple[Tensor, list[KeyValueCache | None]]:
        extended: list[KeyValueCache | None] = []
        for i, (block, past) in enumerate(zip(self.var.blocks, caches, strict=True)):
            x, cache = block(x, modulation[:, i], past)
            extended.append(cache)
        return x, extended
