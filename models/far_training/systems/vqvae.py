"""Training of VAR's VQ-VAE: reconstruction, residual quantisation over the scales, and a codebook that stays in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from far_models.checkpoint.save import export_checkpoint, metadata_of
from far_models.vq_vae import VQVAE, Quantizer, VQVAEConfig
from far_runtime.errors import FarError, SettingName
from far_runtime.sampling.pyramid import SCALES_256, SCALES_512
from far_training.data.mixture import MIRRORED, PictureMixture
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Task
from far_training.systems.batches import run_args
from far_training.systems.losses import gradient_l1
from far_training.systems.reconstructions import reconstruction_reporter
from far_training.systems.settings import VQVAELossSettings

HITS_DECAY = 0.99
"""Decay of the moving average of hits."""
USED = 0.08
"""A code is in use when it is hit more than this share of the mean over all codes (official models/quant.py)."""


class VQVAELosses(nn.Module):
    """The VQ-VAE's losses of a batch, as `vqvae_task` fetches it."""

    hits: Tensor
    """Moving average [V] of how often a step takes each code, summed over all processes."""

    def __init__(self, model: VQVAE, settings: VQVAELossSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.register_buffer("hits", torch.zeros(model.config.vocabulary), persistent=False)

    def forward(self, pictures: Tensor, restart: Tensor) -> dict[str, Tensor]:
        """The loss [] and its terms, of pictures [B, 3, S, S] in [-1, 1]; where `restart` [], codes out of use move."""
        features = self.model.encode(pictures).float()
        with torch.autocast(features.device.type, enabled=False):  # which code is nearest needs all digits
            if restart:
                self.restart(features.detach().flatten(2).transpose(1, 2))
            quantized, quantization, tokens = self.model.quantize(features)
        self.count(tokens)
        decoded = self.model.decode(quantized).float()
        # Rounding, and so a resumed run, depends on the order of these terms.
        l1, square = (decoded - pictures).abs().mean(), (decoded - pictures).square().mean()
        gradient = gradient_l1(decoded, pictures)
        loss = l1 + self.settings.square * square + self.settings.gradient * gradient
        return {
            "loss": loss + self.settings.quantization * quantization,
            "l1": l1,
            "square": square,
            "gradient_l1": gradient,
            "quantization": quantization,
            "codebook_used": self.used().float().mean(),
        }

    def used(self) -> Tensor:
        """Which codes [V] are in use."""
        return self.hits > USED * self.hits.mean()

    @torch.no_grad()
    def count(self, tokens: Tensor) -> None:
        """Take a step's tokens [B, L] into the moving average of hits."""
        hits = torch.bincount(tokens.flatten(), minlength=len(self.hits)).to(self.hits)
        if is_distributed():
            distributed.all_reduce(hits)
        self.hits.lerp_(hits, 1 - HITS_DECAY)

    @torch.no_grad()
    def restart(self, cells: Tensor) -> None:
        """Move codes out of use to residuals of features [B, cells, C], which the coarser scales leave to code."""
        quantizer = self.model.quantize
        vectors = torch.cat([part.flatten(0, 1) for part in residuals(quantizer, cells)])
        picked = vectors[torch.randint(len(vectors), (len(self.hits),), device=vectors.device)]
        if is_distributed():
            distributed.broadcast(picked, 0)
        unused = ~self.used().unsqueeze(1)
        quantizer.embedding.weight.copy_(torch.where(unused, picked, quantizer.embedding.weight))
        # They must not move again before a batch could hit them.
        self.hits.copy_(torch.where(unused[:, 0], self.hits.mean(), self.hits))


def residuals(quantizer: Quantizer, cells: Tensor) -> list[Tensor]:
    """The vectors [B, T, C] that each scale has to code, of features [B, cells, C]."""
    states = quantizer.states(quantizer.encode(cells))
    before = [torch.zeros_like(cells), *states[:-1]]
    ranges = quantizer.ranges
    return [quantizer.down[start:end] @ (cells - state) for (start, end), state in zip(ranges, before, strict=True)]


def is_distributed() -> bool:
    """Whether several processes train."""
    return distributed.is_available() and distributed.is_initialized()


def default_scales(grid: int) -> tuple[int, ...]:
    """The official scales for latents of 16 or 32 cells; for other sides those of 16 below `grid`, and `grid`."""
    return SCALES_512 if grid == SCALES_512[-1] else (*(side for side in SCALES_256 if side < grid), grid)


def vqvae_task(
    config: VQVAEConfig, settings: VQVAELossSettings, pictures: PictureMixture, batch: int, seed: int
) -> Task:
    """Training of a VQ-VAE on pictures.

    batch: pictures of a step. seed: of the new weights.
    FarError for pictures that do not fit the stride or the scales.
    """
    grid, last = pictures.grid(config.stride), config.patch_nums[-1]
    if grid != last:
        raise FarError(
            f"pictures of {pictures.sets[0].size} pixels have {grid} x {grid} latents at stride {config.stride}; the "
            f"last of the scales is {last}: choose ",
            SettingName("scales"),
            f" that end with {grid}, or another ",
            SettingName("multipliers"),
            " or ",
            SettingName("patch"),
        )
    torch.manual_seed(seed)
    model = VQVAE(config)
    nn.init.normal_(model.quantize.embedding.weight, std=0.01)

    def fetch(rng: SampleRng, progress: float) -> tuple[Tensor, ...]:
        source, rows = pictures.rows(batch, rng)
        images = pictures.pictures(source, rows, rng.bernoulli(MIRRORED).numpy())
        due = settings.restart and rng.step % settings.restart == 0 and progress < settings.restart_until
        return images, torch.tensor(bool(due))

    def finish(average: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(average, folder / "vqvae.safetensors", (), summary)

    return Task(
        system="vqvae",
        model=model,
        losses=VQVAELosses(model, settings),
        fetch=fetch,
        epoch_length=pictures.epoch_length,
        args=run_args("vqvae", config, settings),
        report=reconstruction_reporter(pictures.sets),
        finish=finish,
        buffers=("hits",),
        metadata=metadata_of(model),
    )
