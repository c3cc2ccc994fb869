"""Token maps of pictures as training data for VAR: coded on the fly, or read from a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.pictures import PictureSet, load_labels, normalised, read_names
from far_models.vq_vae import VQVAE
from far_runtime.errors import FarError
from far_training.data.cache import (
    check_vae,
    file_digest,
    read_split,
    write_json,
    write_labels,
)
from far_training.data.latents import check_fit
from far_training.data.shards import ROWS, Shards, begin, finish, write_shards
from far_training.loop.processes import ALONE, ProcessGroup

NOTES = "tokens.json"


@dataclass(frozen=True)
class TokenSet:
    """Tokens of pictures and of their mirror images: tokens(rows [n], flip [n]) -> [n, L], all scales in a row.

    `train` are the rows to train on.
    """

    source: Path
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    train: NDArray[np.int64]
    tokens: Callable[[NDArray[np.int64], NDArray[np.bool_]], Tensor]


@torch.no_grad()
def coded(vqvae: VQVAE, pixels: Tensor) -> Tensor:
    """Tokens [n, L] of pictures [n, 3, H, W], on the CPU."""
    features = vqvae.encode(pixels.to(next(vqvae.parameters()).device)).flatten(2).transpose(1, 2)
    return vqvae.quantize.encode(features).cpu()


def check_side(vqvae: VQVAE, pictures: PictureSet) -> None:
    """FarError unless the pictures' latents have the side of the VQ-VAE's last scale."""
    check_fit(vqvae.config.stride, pictures)
    side, last = pictures.size // vqvae.config.stride, vqvae.config.patch_nums[-1]
    if side != last:
        raise FarError(
            f"{pictures.source}: pictures of {pictures.size} pixels have {side} x {side} latents; the VQ-VAE's last "
            f"scale is {last} x {last}: use --size {last * vqvae.config.stride}"
        )


def coded_set(vqvae: VQVAE, pictures: PictureSet) -> TokenSet:
    """Tokens that are computed at every step."""
    check_side(vqvae, pictures)

    def tokens(rows: NDArray[np.int64], flip: NDArray[np.bool_]) -> Tensor:
        return coded(vqvae, pictures.pixels(rows, flip))

    return TokenSet(pictures.source, pictures.labels, pictures.names, pictures.train, tokens)


def write_token_cache(
    vqvae: VQVAE,
    vae_file: Path,
    pictures: PictureSet,
    out: Path,
    batch: int,
    say: Callable[[str], None],
    together: ProcessGroup = ALONE,
) -> None:
    """Write the tokens of all pictures, plain and mirrored, as shards [rows, 2, L] (index 1: mirrored), labels.npy,
    names.json, split.json and tokens.json; see latents.write_cache."""
    check_side(vqvae, pictures)
    count, kind = len(pictures.labels), np.uint16 if vqvae.config.vocabulary <= 1 << 16 else np.int32
    facts = {"pictures": pictures.source.name, "vae_sha256": file_digest(vae_file), "count": count, "rows": ROWS}

    def encoded(images: NDArray[np.uint8]) -> NDArray[np.integer]:
        sides = [coded(vqvae, normalised(side)) for side in (images, images[:, :, ::-1])]
        return torch.stack(sides, dim=1).numpy().astype(kind)

    staging = begin(out, facts)
    write_shards(staging, count, ROWS, pictures.read, encoded, batch, say, together.rank, together.world)
    together.wait()
    if not together.rank:
        write_labels(staging, pictures)
        write_json(staging / NOTES, facts)
        finish(staging, out)


def open_token_cache(path: Path, vae_file: Path, vqvae: VQVAE) -> TokenSet:
    """Open a folder that `write_token_cache` wrote; FarError if it is none, or was made with another VQ-VAE."""
    notes, train = read_split(path, NOTES, "cache-latents")
    check_vae(path, notes.get("vae_sha256"), vae_file)
    count, rows = notes.get("count"), notes.get("rows")
    if not isinstance(count, int) or not isinstance(rows, int):
        raise FarError(
            f"{path / NOTES}: lacks count or rows, so an earlier version made it; make it again with far train "
            "cache-latents"
        )
    shards = Shards(path, count, rows)
    length = sum(side * side for side in vqvae.config.patch_nums)
    if shards.shape[1:] != (2, length) or shards.dtype.kind not in "iu":
        raise FarError(
            f"{path}: shards of {shards.dtype} {list(shards.shape)}; expected whole numbers [N, 2, {length}]"
        )
    labels = load_labels(path / "labels.npy", count)

    def tokens(rows: NDArray[np.int64], flip: NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(shards[rows][np.arange(len(rows)), flip.astype(np.int64)].astype(np.int64))

    return TokenSet(path, labels, read_names(path, labels), train, tokens)
