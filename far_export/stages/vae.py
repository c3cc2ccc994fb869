"""The KL-VAE's stages: decode (latents to pixels), encode (pixels to latents) and moments (pixels to mean and log
variance)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from far_export.stages.flops import count_flops
from far_export.stages.stage import BATCH, Input, Stage
from far_models.islands import island
from far_models.kl_vae import AutoencoderKL
from far_runtime.bundle import TensorSpec


class DecodeStageModule(nn.Module):
    """Scaled latents [B, L, C], L = grid^2 -> pixels uint8 [B, H, W, 3], or with pixels=False the float image
    [B, 3, H, W].

    Pixels are round(255 (x + 1) / 2), clipped, as the official evaluation writes them.
    """

    def __init__(self, vae: AutoencoderKL, grid: int, latent_scale: float, pixels: bool = True) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.grid = grid
        self.channels = vae.config.channels
        self.latent_scale = latent_scale
        self.pixels = pixels

    def forward(self, latents: Tensor) -> Tensor:
        dtype = self.post_quant_conv.weight.dtype
        x = latents.reshape(-1, self.grid, self.grid, self.channels).permute(0, 3, 1, 2)
        image: Tensor = self.decoder(self.post_quant_conv((x / self.latent_scale).to(dtype))).float()
        if not self.pixels:
            return image
        island("pixels")
        return ((image + 1) / 2 * 255).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


class MomentsStageModule(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> unscaled mean and log variance [B, C, H / stride, W / stride]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.vae.encode(images.to(self.vae.encoder.conv_in.weight.dtype))


def decode_stage(vae: AutoencoderKL, grid: int, latent_scale: float, pixels: bool = True) -> Stage:
    """The VAE decoder over grid x grid latents; see DecodeStageModule."""
    config = vae.config
    side = grid * config.stride
    module = DecodeStageModule(vae, grid, latent_scale, pixels).eval()
    shape: tuple[int | str, ...] = ("batch", side, side, 3) if pixels else ("batch", 3, side, side)
    return Stage(
        stage="decode",
        module=module,
        inputs=(Input("latents", ("batch", grid * grid, config.channels)),),
        outputs=(TensorSpec("pixels" if pixels else "image", "uint8" if pixels else "float32", shape),),
        profile={"batch": BATCH},
        # A value near the middle of two uint8 pixels may be rounded to either.
        tolerance=2e-3 if pixels else 1e-4,
        fp32_islands=("norm", "softmax", *(("pixels",) if pixels else ())),
        flops={"": count_flops(module, (torch.empty(1, grid * grid, config.channels, device="meta"),))},
    )


class EncodeTokensStageModule(nn.Module):
    """Pixels uint8 [B, H, W, 3] -> scaled latents [B, L, C]: the mean of the posterior."""

    def __init__(self, vae: AutoencoderKL, latent_scale: float) -> None:
        super().__init__()
        self.vae = vae
        self.latent_scale = latent_scale

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
        mean = self.vae.encode(images.to(self.vae.encoder.conv_in.weight.dtype))[0].float()
        return mean.flatten(2).transpose(1, 2) * self.latent_scale


def encode_stage(vae: AutoencoderKL, grid: int, latent_scale: float) -> Stage:
    """The VAE encoder over pictures of the model's size, for editing."""
    config, side = vae.config, grid * vae.config.stride
    module = EncodeTokensStageModule(vae, latent_scale).eval()
    return Stage(
        stage="encode",
        module=module,
        inputs=(Input("pixels", ("batch", side, side, 3), "uint8", 256),),
        outputs=(TensorSpec("latents", "float32", ("batch", grid * grid, config.channels)),),
        profile={"batch": BATCH},
        fp32_islands=("norm", "softmax"),
        flops={"": count_flops(module, (torch.empty(1, side, side, 3, dtype=torch.uint8, device="meta"),))},
    )


def moments_stage(vae: AutoencoderKL, height: int, width: int) -> Stage:
    """The VAE encoder's mean and log variance over float pictures of height x width pixels."""
    config = vae.config
    module = MomentsStageModule(vae).eval()
    latent = ("batch", config.channels, height // config.stride, width // config.stride)
    return Stage(
        stage="moments",
        module=module,
        inputs=(Input("images", ("batch", 3, height, width)),),
        outputs=(TensorSpec("mean", "float32", latent), TensorSpec("logvar", "float32", latent)),
        profile={"batch": BATCH},
        fp32_islands=("norm", "softmax"),
        flops={"": count_flops(module, (torch.empty(1, 3, height, width, device="meta"),))},
    )
