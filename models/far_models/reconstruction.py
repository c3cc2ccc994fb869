"""Reconstructions of pictures by an autoencoder, their PSNR, and pictures laid out on a sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from far_models.kl_vae import AutoencoderKL
from far_models.pictures import PictureSet, normalised
from far_models.vq_vae import VQVAE
from far_runtime.storage.atomic import whole_file


def evenly(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of the rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(np.int64)]


def reconstruct(model: nn.Module, pictures: PictureSet, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Reconstructions uint8 [n, S, S, 3] of rows, decoded from their mean latents (KL-VAE) or their tokens (VQ-VAE)."""
    return reconstruct_pixels(model, pictures.read(rows))


@torch.no_grad()
def reconstruct_pixels(model: nn.Module, images: NDArray[np.uint8], batch: int = 32) -> NDArray[np.uint8]:
    """Reconstructions of pictures uint8 [n, S, S, 3], of the same shape and type."""
    device = next(model.parameters()).device
    reconstructions = []
    for start in range(0, len(images), batch):
        pixels = normalised(images[start : start + batch]).to(device)
        decoded = model(pixels)[0] if isinstance(model, VQVAE) else model.decode(model.encode(pixels)[0])
        reconstructions.append(to_pixels(decoded.float().cpu().numpy()))
    return np.concatenate(reconstructions)


@torch.no_grad()
def decode_pixels(model: AutoencoderKL, latents: Tensor, batch: int = 32) -> NDArray[np.uint8]:
    """Pictures uint8 [n, S, S, 3] of latents [n, C, g, g]."""
    parts = latents.to(next(model.parameters()).device).split(batch)
    return np.concatenate([to_pixels(model.decode(part).float().cpu().numpy()) for part in parts])


def reconstruction_psnr(model: nn.Module, pictures: PictureSet, rows: NDArray[np.int64]) -> float:
    """Mean PSNR in dB of the reconstructions of rows."""
    return psnr(reconstruct(model, pictures, rows), pictures.read(rows))


def comparison(model: nn.Module, pictures: PictureSet, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A sheet [rows, columns, 3] of pairs: each picture and, to its right, its reconstruction."""
    pairs = np.stack([pictures.read(rows), reconstruct(model, pictures, rows)], axis=1)
    return tile(pairs.reshape(-1, *pairs.shape[2:]), 16)


def tile(pictures: NDArray[np.uint8], columns: int, gap: int = 2) -> NDArray[np.uint8]:
    """A sheet [rows, columns, 3] of pictures [N, H, W, 3] in reading order, with `gap` grey pixels around each."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 160, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def save_picture(picture: NDArray[np.uint8], path: Path) -> None:
    """Write a picture [H, W, 3] whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside:
        # The quality is WebP's; PNG ignores it.
        Image.fromarray(picture).save(aside, Image.registered_extensions()[path.suffix.lower()], quality=90)


def to_pixels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pictures uint8 [N, H, W, 3] of pictures float32 [N, 3, H, W] in [-1, 1]."""
    rounded = np.rint(np.clip(values, -1, 1) * 127.5 + 127.5)
    return rounded.astype(np.uint8).transpose(0, 2, 3, 1)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB, averaged over pictures [N, H, W, 3]."""
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-10))).mean())
