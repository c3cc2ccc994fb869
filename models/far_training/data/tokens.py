"""Token maps of pictures as training data for VAR: computed at every step, or read from a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.pictures import PictureSet, load_labels, read_names
from far_models.vq_vae import VQVAE
from far_runtime.bundle import sha256_of
from far_runtime.errors import FarError, SettingName
from far_training.data.cache import check_vae, encoded_both_ways, read_split, write_json, write_labels
from far_training.data.latents import latent_grid
from far_training.data.shards import ROWS, ShardedArray, open_noted_shards, sharded_folder
from far_training.loop.display import Log
from far_training.loop.processes import ALONE, ProcessGroup

NOTES = "tokens.json"
UINT16_CODES = 1 << 16


@dataclass(frozen=True)
class TokenSet:
    """The tokens of pictures and of their mirror images."""

    source: Path
    """Folder of the cache or of the pictures."""
    labels: NDArray[np.int64]
    """Classes [N] of the pictures."""
    names: tuple[str, ...]
    """Names of the classes."""
    train: NDArray[np.int64]
    """Rows to train on."""
    tokens: Callable[[NDArray[np.int64], NDArray[np.bool_]], Tensor]
    """tokens(rows [n], mirrored [n]): token ids [n, L], of all scales in a row."""


@torch.no_grad()
def coded(vqvae: VQVAE, pixels: Tensor) -> Tensor:
    """Tokens [n, L] of pictures [n, 3, H, W], on the CPU."""
    features = vqvae.encode(pixels.to(next(vqvae.parameters()).device)).flatten(2).transpose(1, 2)
    return vqvae.quantize.encode(features).cpu()


def check_grid(vqvae: VQVAE, pictures: PictureSet) -> None:
    """FarError unless the pictures' latents have the side of the VQ-VAE's last scale."""
    grid, last = latent_grid(vqvae.config.stride, pictures), vqvae.config.patch_nums[-1]
    if grid != last:
        raise FarError(
            f"{pictures.source}: pictures of {pictures.size} pixels have {grid} x {grid} latents; the VQ-VAE's last "
            f"scale is {last} x {last}: use ",
            SettingName("size"),
            f" {last * vqvae.config.stride}",
        )


def coded_set(vqvae: VQVAE, pictures: PictureSet) -> TokenSet:
    """Tokens that are computed at every step."""
    check_grid(vqvae, pictures)

    def tokens(rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Tensor:
        return coded(vqvae, pictures.pixels(rows, mirrored))

    return TokenSet(
        source=pictures.source, labels=pictures.labels, names=pictures.names, train=pictures.train, tokens=tokens
    )


def write_token_cache(
    vqvae: VQVAE,
    vae_file: Path,
    pictures: PictureSet,
    out: Path,
    batch: int,
    log: Log,
    group: ProcessGroup = ALONE,
) -> None:
    """Write the tokens of all pictures and their mirror images; see latents.write_cache.

    The folder holds shards [rows, 2, L] (index 1: mirrored), labels.npy, names.json, split.json and tokens.json.
    """
    check_grid(vqvae, pictures)
    dtype = np.uint16 if vqvae.config.vocabulary <= UINT16_CODES else np.int32

    def encoded(images: NDArray[np.uint8]) -> NDArray[np.integer]:
        return encoded_both_ways(lambda pixels: coded(vqvae, pixels), images).numpy().astype(dtype)

    array = ShardedArray(count=len(pictures.labels), rows=ROWS, read=pictures.read, encode=encoded, batch=batch)
    facts = {"pictures": pictures.source.name, "vae_sha256": sha256_of(vae_file), "count": array.count, "rows": ROWS}
    with sharded_folder(out, facts, array, log, group) as folder:
        if folder is not None:
            write_labels(folder, pictures)
            write_json(folder / NOTES, facts)


def open_token_cache(path: Path, vae_file: Path, vqvae: VQVAE) -> TokenSet:
    """Open a folder that `write_token_cache` wrote; FarError if it is none, or made with another VQ-VAE."""
    notes, train = read_split(path, NOTES, "cache-latents")
    check_vae(path, notes.get("vae_sha256"), vae_file)
    shards = open_noted_shards(path, notes, NOTES)
    length = sum(side * side for side in vqvae.config.patch_nums)
    if shards.shape[1:] != (2, length) or shards.dtype.kind not in "iu":
        raise FarError(
            f"{path}: shards of {shards.dtype} {list(shards.shape)}; expected whole numbers [N, 2, {length}]"
        )
    labels = load_labels(path / "labels.npy", shards.count)

    def tokens(rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(shards.pick(rows, mirrored).astype(np.int64))

    return TokenSet(source=path, labels=labels, names=read_names(path, labels), train=train, tokens=tokens)
