"""Training of VAR's VQ-VAE: reconstruction, residual quantisation over the scales, and a codebook that stays in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from far_models.checkpoint.save import export_checkpoint, metadata_of
from far_models.pictures import PictureSet
from far_models.vq_vae import VQVAE, Quantizer, VQVAEConfig
from far_runtime.errors import FarError
from far_runtime.sampling.pyramid import SCALES_256, SCALES_512
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Task
from far_training.systems.batches import run_args
from far_training.systems.losses import gradient_l1
from far_training.systems.vae import drawn_pictures, grid_of_pictures, reconstruction_reporter

DECAY = 0.99
USED = 0.08
"""A code counts as used when it is hit more than this share of what all codes hit on average (official
models/quant.py)."""


@dataclass(frozen=True)
class VQVAELossSettings:
    """Weights of the loss: L1 + `square` x squared error + `gradient` x L1 of pixel differences + `quantization` x
    (codebook + 0.25 commitment, mean over the scales).

    restart: every so many steps, in the first `restart_until` of the run, codes that are not used take the place of
    vectors that the batch left to code (0: never). The first time is the first step, when none is used.
    """

    square: float = 1.0
    gradient: float = 0.5
    quantization: float = 1.0
    restart: int = 50
    restart_until: float = 0.6


class VQVAELosses(nn.Module):
    """Losses of pictures [B, 3, S, S] in [-1, 1]; `restart` [] tells to give unused codes new places.

    hits [V]: moving average of how often a step takes each code, of all processes together.
    """

    hits: Tensor

    def __init__(self, model: VQVAE, settings: VQVAELossSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.register_buffer("hits", torch.zeros(model.config.vocabulary), persistent=False)

    def forward(self, pictures: Tensor, restart: Tensor) -> dict[str, Tensor]:
        features = self.model.encode(pictures).float()
        with torch.autocast(features.device.type, enabled=False):  # which code is nearest needs all digits
            if restart:
                self.restart(features.detach().flatten(2).transpose(1, 2))
            quantized, quantization, tokens = self.model.quantize(features)
        self.count(tokens)
        decoded = self.model.decode(quantized).float()
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
        """Take the tokens of a step into the average."""
        hits = torch.bincount(tokens.flatten(), minlength=len(self.hits)).to(self.hits)
        if together():
            distributed.all_reduce(hits)
        self.hits.lerp_(hits, 1 - DECAY)

    @torch.no_grad()
    def restart(self, cells: Tensor) -> None:
        """Put unused codes where vectors of the features [B, cells, C] are that the coarser scales leave to code."""
        quantizer = self.model.quantize
        left = torch.cat([part.flatten(0, 1) for part in leftovers(quantizer, cells)])
        picked = left[torch.randint(len(left), (len(self.hits),), device=left.device)]
        if together():
            distributed.broadcast(picked, 0)
        unused = ~self.used().unsqueeze(1)
        quantizer.embedding.weight.copy_(torch.where(unused, picked, quantizer.embedding.weight))
        # They are not to be moved again before they had a chance.
        self.hits.copy_(torch.where(unused[:, 0], self.hits.mean(), self.hits))


def leftovers(quantizer: Quantizer, cells: Tensor) -> list[Tensor]:
    """The vectors [B, T, C] that each scale has to code, of features [B, cells, C]."""
    states = quantizer.states(quantizer.encode(cells))
    before = [torch.zeros_like(cells), *states[:-1]]
    ranges = quantizer.ranges
    return [quantizer.down[start:end] @ (cells - state) for (start, end), state in zip(ranges, before, strict=True)]


def together() -> bool:
    """Whether several processes train."""
    return distributed.is_available() and distributed.is_initialized()


def default_scales(grid: int) -> tuple[int, ...]:
    """The official scales of 16 and 32 cells, or the former's as far as they go and the grid itself."""
    return SCALES_512 if grid == SCALES_512[-1] else (*(side for side in SCALES_256 if side < grid), grid)


def vqvae_task(
    config: VQVAEConfig,
    settings: VQVAELossSettings,
    sets: Sequence[PictureSet],
    shares: Sequence[float],
    batch: int,
    seed: int,
) -> Task:
    """Training of a VQ-VAE on one or several picture sets; `shares` are their parts of each batch. FarError for
    pictures that do not fit the stride or the scales."""
    grid, last = grid_of_pictures(sets, config.stride), config.patch_nums[-1]
    if grid != last:
        raise FarError(
            f"pictures of {sets[0].size} pixels have {grid} x {grid} latents at stride {config.stride}; the last of "
            f"the scales is {last}: choose --scales that end with {grid}, or other --multipliers and --patch"
        )
    torch.manual_seed(seed)
    model = VQVAE(config)
    nn.init.normal_(model.quantize.embedding.weight, std=0.01)
    losses = VQVAELosses(model, settings)

    def fetch(chance: SampleRng, done: float) -> tuple[Tensor, ...]:
        pictures = drawn_pictures(sets, shares, batch, chance)
        due = settings.restart and chance.step % settings.restart == 0 and done < settings.restart_until
        return pictures, torch.tensor(bool(due))

    def finish(ema: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(ema, folder / "vqvae.safetensors", (), summary)

    return Task(
        "vqvae",
        model,
        losses,
        fetch,
        len(sets[0].train),
        run_args("vqvae", config, settings),
        reconstruction_reporter(sets),
        finish,
        kept=("hits",),
        metadata=metadata_of(model),
    )
