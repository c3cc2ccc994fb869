"""Latents that FAR draws anew of given pictures, so that a decoder learns to forgive what FAR gets wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_models.far import FAR
from far_models.kl_vae import AutoencoderKL
from far_models.training.cache import file_digest, new_folder, write_json
from far_models.training.data import PictureSet, load_array
from far_models.training.latents import check_fit, encode
from far_runtime.errors import FarError

NOTES = "redrawn.json"


@dataclass(frozen=True)
class RedrawnSet:
    """Latents [n, C, g, g] of some pictures, in the VAE's own scale: latents(rows [n], draw [n])."""

    source: Path
    draws: int
    latents: Callable[[NDArray[np.int64], NDArray[np.int64]], Tensor]


@torch.no_grad()
def write_redrawn(
    far: FAR,
    far_file: Path,
    vae: AutoencoderKL,
    pictures: PictureSet,
    out: Path,
    draws: int,
    levels: int,
    batch: int,
    say: Callable[[str], None],
    sampling: Mapping[str, Any],
) -> None:
    """Write `draws` latents of every training picture, as FAR draws them under the picture's class.

    Draw k begins with the picture's own latents and draws the last 1 + k mod `levels` levels (their input low-passed,
    as always), so that what is drawn differs from the picture by no more than FAR's own errors there. Pictures are not
    mirrored. The folder holds latents.npy [N, draws, C, g, g] float16, in the VAE's scale, and redrawn.json, and
    appears whole. FarError if the folder exists, or model and pictures do not fit.
    """
    from far_export.graphs import SYSTEMS
    from far_export.torch_engine import TorchEngine
    from far_runtime.noise import SeedNoise
    from far_runtime.samplers import far as loop
    from far_runtime.samplers.base import label_condition

    check_fit(vae.config.stride, pictures)
    config, grid = far.config, pictures.size // vae.config.stride
    if (config.grid, config.channels) != (grid, vae.config.channels):
        raise FarError(
            f"{far_file}: draws latents of {config.channels} channels on {config.grid} x {config.grid}; the VAE gives "
            f"{vae.config.channels} on {grid} x {grid}"
        )
    if len(pictures.names) > config.classes:
        raise FarError(f"{pictures.source}: {len(pictures.names)} classes; {far_file} has {config.classes}")
    info = SYSTEMS["far"].info(far, vae)
    steps = loop.plan(info, loop.settle(info, sampling))
    if levels > len(steps):
        raise FarError(f"--levels {levels}: {far_file} draws {len(steps)} levels")
    device = next(far.parameters()).device
    engine = TorchEngine(SYSTEMS["far"].stages(far, vae, info, None), str(device))
    rows = pictures.train
    found = np.zeros((len(pictures.labels), draws, config.channels, grid, grid), np.float16)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        mean, _ = encode(vae, pictures.pixels(part))
        own = (config.latent_scale * mean).flatten(2).transpose(1, 2).to(device)
        condition = label_condition(engine, [int(label) for label in pictures.labels[part]], config.classes)
        for draw in range(draws):
            noise = SeedNoise([int(row) * draws + draw for row in part])
            last = steps[len(steps) - 1 - draw % levels :]
            drawn = np.asarray(engine.get(loop.run_steps(engine, info, last, condition, noise, latents=own)))
            found[part, draw] = (drawn / config.latent_scale).transpose(0, 2, 1).reshape(found[part, draw].shape)
        say(f"{min(start + batch, len(rows))} of {len(rows)} pictures")
    if not np.isfinite(found).all():
        raise FarError(f"{far_file}: draws latents that float16 cannot hold")
    with new_folder(out) as folder:
        np.save(folder / "latents.npy", found)
        write_json(
            folder / NOTES,
            {
                "pictures": pictures.source.name,
                "far_sha256": file_digest(far_file),
                "encoder_sha256": encoder_digest(vae),
                "levels": levels,
                "sampling": dict(sampling),
            },
        )


def open_redrawn(path: Path, pictures: PictureSet, vae: AutoencoderKL) -> RedrawnSet:
    """Open a folder that `write_redrawn` wrote for these pictures; FarError if it is none, or of another encoder."""
    try:
        notes = dict(json.loads((path / NOTES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FarError(f"{path}: lacks a readable {NOTES}; make it with far train redraw-latents") from error
    if notes.get("encoder_sha256") != encoder_digest(vae):
        raise FarError(f"{path}: made with another encoder; make it again with far train redraw-latents")
    found = load_array(path / "latents.npy")
    grid = pictures.size // vae.config.stride
    if found.ndim != 5 or (len(found), *found.shape[2:]) != (len(pictures.labels), vae.config.channels, grid, grid):
        raise FarError(
            f"{path / 'latents.npy'}: {list(found.shape)}; expected [{len(pictures.labels)}, draws, "
            f"{vae.config.channels}, {grid}, {grid}]"
        )

    def latents(rows: NDArray[np.int64], draw: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.asarray(found[rows, draw], np.float32))

    return RedrawnSet(path, found.shape[1], latents)


def encoder_digest(vae: AutoencoderKL) -> str:
    """SHA-256 of the weights that make latents: a VAE whose decoder was trained further has the same."""
    digest = hashlib.sha256()
    for part in (vae.encoder, vae.quant_conv):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
