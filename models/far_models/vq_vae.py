"""VAR's VQ-VAE: pictures into a pyramid of token maps and back (VAR section 3.2, algorithms 1 and 2; official
models/vqvae.py and models/quant.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from far_models.kl_vae import Decoder, Encoder, VAEConfig
from far_runtime.sampling.pyramid import SCALES_256, phi_index, resize_tables, token_ranges

PHI_SHARE = 0.5
COMMITMENT = 0.25


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a VQ-VAE; the official one (vae_ch160v4096z32) is the default.

    ch, multipliers, blocks, patch: encoder and decoder, as in VAEConfig. channels: of one code. vocabulary: codes.
    phis: convolutions that the scales share. patch_nums: sides of the token maps, the last is the latents' side.
    """

    ch: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    patch: int = 1
    channels: int = 32
    vocabulary: int = 4096
    phis: int = 4
    patch_nums: tuple[int, ...] = SCALES_256

    @property
    def autoencoder(self) -> VAEConfig:
        """The sizes of encoder and decoder."""
        return VAEConfig(self.ch, self.multipliers, self.blocks, self.channels, self.patch)

    @property
    def stride(self) -> int:
        """Pixels per latent cell along one side."""
        return self.autoencoder.stride


class Phi(nn.Conv2d):
    """Half the input plus half its convolution; [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - PHI_SHARE) + super().forward(x) * PHI_SHARE


class Phis(nn.Module):
    """The convolutions that the scales share."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels) for _ in range(count))


class Quantizer(nn.Module):
    """Residual quantiser over a pyramid of token maps, coarse to fine, with one codebook.

    Feature maps are [B, cells, C], all scales' tokens together [B, L]. `up` and `down` [L, cells] are the resizes.
    """

    up: Tensor
    down: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        scales = config.patch_nums
        self.side = scales[-1]
        self.ranges = token_ranges(scales)
        self.phi_of = [phi_index(i, len(scales), config.phis) for i in range(len(scales))]
        self.embedding = nn.Embedding(config.vocabulary, config.channels)
        self.quant_resi = Phis(config.channels, config.phis)
        for name, table in zip(("up", "down"), resize_tables(scales), strict=True):
            self.register_buffer(name, torch.from_numpy(table.copy()), persistent=False)

    def grown(self, scale: int, embeddings: Tensor) -> Tensor:
        """What embeddings [B, T, C] of a scale add to the feature map [B, cells, C]."""
        start, end = self.ranges[scale]
        return self.refined(self.up[start:end].T @ embeddings, self.quant_resi.qresi_ls[self.phi_of[scale]])

    def refined(self, cells: Tensor, phi: nn.Module) -> Tensor:
        """phi over the grid of cells [B, cells, C]."""
        grid = cells.transpose(1, 2).reshape(-1, cells.shape[-1], self.side, self.side)
        out: Tensor = phi(grid).flatten(2).transpose(1, 2)
        return out

    def nearest(self, vectors: Tensor) -> Tensor:
        """The codes [B, T] that are nearest to vectors [B, T, C]."""
        codes = self.embedding.weight
        return (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(-1)

    def encode(self, features: Tensor) -> Tensor:
        """Tokens [B, L] of all scales of features [B, cells, C]: each scale codes what the coarser ones left."""
        rest, tokens = features, []
        for scale, (start, end) in enumerate(self.ranges):
            tokens.append(self.nearest(self.down[start:end] @ rest))
            rest = rest - self.grown(scale, self.embedding(tokens[-1]))
        return torch.cat(tokens, dim=1)

    def states(self, tokens: Tensor) -> list[Tensor]:
        """The feature map [B, cells, C] after every scale of tokens [B, L]."""
        embeddings = self.embedding(tokens)
        states, total = [], embeddings.new_zeros(1)
        for scale, (start, end) in enumerate(self.ranges):
            total = total + self.grown(scale, embeddings[:, start:end])
            states.append(total)
        return states

    def inputs(self, tokens: Tensor) -> Tensor:
        """VAR's inputs [B, L - first, C] under teacher forcing: every state shrunk to the scale after it."""
        pairs = zip(self.states(tokens)[:-1], self.ranges[1:], strict=True)
        return torch.cat([self.down[start:end] @ state for state, (start, end) in pairs], dim=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised features [B, C, h, w] whose gradient goes straight to `features`, the quantisation loss (codebook
        plus a quarter commitment, mean over scales), and the tokens [B, L]."""
        cells = features.flatten(2).transpose(1, 2)
        with torch.no_grad():
            tokens = self.encode(cells)
        states = self.states(tokens)
        losses = [
            functional.mse_loss(state, cells.detach()) + COMMITMENT * functional.mse_loss(state.detach(), cells)
            for state in states
        ]
        straight = cells + (states[-1] - cells).detach()
        return straight.transpose(1, 2).reshape(features.shape), torch.stack(losses).mean(), tokens


class VQVAE(nn.Module):
    """Encoder, quantiser, decoder and the 3 x 3 convolutions around the feature map, under the official names."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.autoencoder
        self.encoder = Encoder(sizes, outputs=config.channels, fused=True)
        self.decoder = Decoder(sizes, attention=True, fused=True)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 3, padding=1)

    def encode(self, images: Tensor) -> Tensor:
        """Features [B, C, h, w], not yet quantised, of pictures [B, 3, H, W] in [-1, 1]."""
        out: Tensor = self.quant_conv(self.encoder(images))
        return out

    def decode(self, features: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], about [-1, 1] (not clipped), of quantised features [B, C, h, w]."""
        out: Tensor = self.decoder(self.post_quant_conv(features))
        return out

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, quantisation loss and tokens [B, L] of pictures [B, 3, H, W], for training."""
        quantized, loss, tokens = self.quantize(self.encode(images))
        return self.decode(quantized), loss, tokens

    def with_scales(self, patch_nums: tuple[int, ...]) -> VQVAE:
        """The same weights over other scales (the official 512 px models take the 256 px models' VQ-VAE)."""
        if patch_nums == self.config.patch_nums:
            return self
        with torch.device("meta"):
            other = VQVAE(replace(self.config, patch_nums=patch_nums))
        other.load_state_dict(self.state_dict(), assign=True)
        return other.requires_grad_(False).train(self.training)
