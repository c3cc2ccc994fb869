"""KL-VAE: pictures to continuous latents and back (official models/vae.py and kl16.ckpt, after LDM's autoencoder)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from far_models.islands import softmax


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a KL-VAE; the default is the official kl16 (stride 16)."""

    ch: int = 128
    """Width of the highest resolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of every resolution, from the highest to the lowest, as a multiple of `ch`."""
    blocks: int = 2
    """Residual blocks of the encoder at every resolution; the decoder has one more."""
    channels: int = 16
    """Channels of the latents."""
    patch: int = 1
    """Side of the squares of pixels that are folded into channels before the encoder."""
    encoder_attention: bool = True
    """Whether the encoder has attention after every block of its lowest resolution, as the official one has."""

    @property
    def stride(self) -> int:
        """Pixels per latent cell along one side: patch * 2^(resolutions - 1)."""
        stride: int = self.patch * 2 ** (len(self.multipliers) - 1)
        return stride


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with the official 32 groups, or fewer where 32 does not divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Norm, SiLU and convolution, twice, plus a shortcut; [B, c_in, h, w] -> [B, c_out, h, w]."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the cells of [B, c, h, w].

    fused: one convolution `qkv` for queries, keys and values, as in VAR's VQ-VAE.
    """

    def __init__(self, channels: int, fused: bool = False) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        if fused:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q = nn.Conv2d(channels, channels, 1)
            self.k = nn.Conv2d(channels, channels, 1)
            self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        parts = self.qkv(h).chunk(3, dim=1) if hasattr(self, "qkv") else (self.q(h), self.k(h), self.v(h))
        # Each [B, c, cells].
        q, k, v = (part.flatten(2) for part in parts)
        # Scaled first, so that the products of wide networks stay within FP16's range.
        weights = softmax((q.transpose(1, 2) * q.shape[1] ** -0.5) @ k)
        h = (v @ weights.transpose(1, 2)).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Convolution of stride 2, padded at the right and at the bottom; [B, c, h, w] -> [B, c, h/2, w/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(functional.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour resize by 2, then a convolution; [B, c, h, w] -> [B, c, 2h, 2w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """One resolution of encoder or decoder: residual blocks, each with optional attention, then a resampling."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: bool, fused: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out, fused) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Mid(nn.Module):
    """Block, attention, block at the latents' resolution."""

    def __init__(self, channels: int, fused: bool = False) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels, fused)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> [B, outputs, H / stride, W / stride]; outputs: 2 x channels by default."""

    def __init__(self, config: VAEConfig, outputs: int | None = None, fused: bool = False) -> None:
        super().__init__()
        self.patch = config.patch
        widths = [config.ch * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            last = i == len(widths) - 1
            level = Level(c_in, c_out, config.blocks, last and config.encoder_attention, fused)
            if not last:
                level.downsample = Downsample(c_out)
            self.down.append(level)
        self.mid = Mid(widths[-1], fused)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], outputs or 2 * config.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.patch > 1:
            x = functional.pixel_unshuffle(x, self.patch)
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(functional.silu(self.norm_out(self.mid(x))))
        return out


class Decoder(nn.Module):
    """Latents [B, channels, h, w] -> pictures [B, 3, h * stride, w * stride], about [-1, 1].

    attention: whether every block of the lowest resolution has attention, as in VAR's VQ-VAE.
    """

    def __init__(self, config: VAEConfig, attention: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.patch = config.patch
        widths = [config.ch * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], fused)
        levels = []
        for i in reversed(range(len(widths))):
            c_in = widths[min(i + 1, len(widths) - 1)]
            level = Level(c_in, widths[i], config.blocks + 1, attention and i == len(widths) - 1, fused)
            if i > 0:
                level.upsample = Upsample(widths[i])
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(functional.silu(self.norm_out(x)))
        return functional.pixel_shuffle(x, self.patch) if self.patch > 1 else x


class AutoencoderKL(nn.Module):
    """Encoder, decoder and the two 1 x 1 convolutions around the latents, with the official names."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, channels, h, w] of pictures [B, 3, H, W] in [-1, 1].

        The log variance is clamped to [-30, 20].
        """
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], about [-1, 1], of unscaled latents [B, channels, h, w]."""
        out: Tensor = self.decoder(self.post_quant_conv(latents))
        return out
