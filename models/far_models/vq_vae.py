"""VAR's VQ-VAE: pictures to a pyramid of token maps and back (VAR section 3.2, algorithms 1 and 2; official
models/vqvae.py and models/quant.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from far_models.kl_vae import Decoder, Encoder, VAEConfig
from far_runtime.sampling.pyramid import SCALES_256, phi_index, resize_tables, token_ranges

PHI_SHARE = 0.5
"""Share of the convolution in the output of a phi."""
COMMITMENT = 0.25
"""Weight of the commitment loss."""


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a VQ-VAE; the default is the official one (vae_ch160v4096z32). Fields without a description are
    VAEConfig's."""

    ch: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    patch: int = 1
    channels: int = 32
    """Channels of one code."""
    vocabulary: int = 4096
    """Codes in the codebook."""
    phis: int = 4
    """Convolutions that the scales share."""
    patch_nums: tuple[int, ...] = SCALES_256
    """Sides of the token maps, from the coarsest scale to the finest, which is the latents' side."""

    @property
    def autoencoder(self) -> VAEConfig:
        """The sizes of encoder and decoder."""
        return VAEConfig(
            ch=self.ch, multipliers=self.multipliers, blocks=self.blocks, channels=self.channels, patch=self.patch
        )

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
    """The convolutions that the scales share, under their official name."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels) for _ in range(count))


class Quantizer(nn.Module):
    """Residual quantiser over a pyramid of token maps, from coarse to fine, with one codebook.

    Feature maps are [B, cells, C], the tokens of all scales [B, L].
    """

    up: Tensor
    """Resizes from every scale to the cells [L, cells]."""
    down: Tensor
    """Resizes from the cells to every scale [L, cells]."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        scales = config.patch_nums
        self.side = scales[-1]
        self.ranges = token_ranges(scales)
        self.phi_indices = [phi_index(i, len(scales), config.phis) for i in range(len(scales))]
        self.embedding = nn.Embedding(config.vocabulary, config.channels)
        self.quant_resi = Phis(config.channels, config.phis)
        for name, table in zip(("up", "down"), resize_tables(scales), strict=True):
            self.register_buffer(name, torch.from_numpy(table.copy()), persistent=False)

    def contribution(self, scale: int, embeddings: Tensor) -> Tensor:
        """What a scale's embeddings [B, T, C] add to the feature map [B, cells, C]."""
        start, end = self.ranges[scale]
        return self.apply_phi(self.up[start:end].T @ embeddings, self.quant_resi.qresi_ls[self.phi_indices[scale]])

    def apply_phi(self, cells: Tensor, phi: nn.Module) -> Tensor:
        """The convolution phi over cells [B, cells, C], as a grid."""
        grid = cells.transpose(1, 2).reshape(-1, cells.shape[-1], self.side, self.side)
        out: Tensor = phi(grid).flatten(2).transpose(1, 2)
        return out

    def nearest(self, vectors: Tensor) -> Tensor:
        """The codes [B, T] nearest to vectors [B, T, C]."""
        codes = self.embedding.weight
        return (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(-1)

    def encode(self, features: Tensor) -> Tensor:
        """Tokens of all scales [B, L] of features [B, cells, C]: each scale encodes what the coarser scales left."""
        residual, tokens = features, []
        for scale, (start, end) in enumerate(self.ranges):
            tokens.append(self.nearest(self.down[start:end] @ residual))
            residual = residual - self.contribution(scale, self.embedding(tokens[-1]))
        return torch.cat(tokens, dim=1)

    def states(self, tokens: Tensor) -> list[Tensor]:
        """The feature map [B, cells, C] after every scale of tokens [B, L]."""
        embeddings = self.embedding(tokens)
        states, total = [], embeddings.new_zeros(1)
        for scale, (start, end) in enumerate(self.ranges):
            total = total + self.contribution(scale, embeddings[:, start:end])
            states.append(total)
        return states

    def inputs(self, tokens: Tensor) -> Tensor:
        """VAR's inputs [B, L - first_tokens, C] for teacher forcing: every state resized to the scale after it."""
        pairs = zip(self.states(tokens)[:-1], self.ranges[1:], strict=True)
        return torch.cat([self.down[start:end] @ state for state, (start, end) in pairs], dim=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised features [B, C, h, w], the quantisation loss and the tokens [B, L], for training.

        The gradient passes straight through to `features`. The loss is the codebook's plus COMMITMENT times the
        commitment's, averaged over scales.
        """
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
    """Encoder, quantiser, decoder and the 3 x 3 convolutions around the feature map, with the official names."""

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
        """Features [B, C, h, w] before quantisation, of pictures [B, 3, H, W] in [-1, 1]."""
        out: Tensor = self.quant_conv(self.encoder(images))
        return out

    def decode(self, features: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], about [-1, 1] and not clipped, of quantised features [B, C, h, w]."""
        out: Tensor = self.decoder(self.post_quant_conv(features))
        return out

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, quantisation loss and tokens [B, L] of pictures [B, 3, H, W], for training."""
        quantized, loss, tokens = self.quantize(self.encode(images))
        return self.decode(quantized), loss, tokens

    def with_scales(self, patch_nums: tuple[int, ...]) -> VQVAE:
        """A VQ-VAE with the same weights and other scales; the official 512 px models use that of the 256 px models."""
        if patch_nums == self.config.patch_nums:
            return self
        with torch.device("meta"):
            other = VQVAE(replace(self.config, patch_nums=patch_nums))
        other.load_state_dict(self.state_dict(), assign=True)
        return other.requires_grad_(False).train(self.training)
