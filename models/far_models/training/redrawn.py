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
from far_models.training.batches import check_classes
from far_models.training.cache import file_digest, write_json
from far_models.training.data import PictureSet, load_array
from far_models.training.latents import check_fit, encode
from far_models.training.processes import ALONE, Together
from far_models.training.shards import Shards, begin, finish, write_shards
from far_runtime.errors import FarError

NOTES, ROWS = "redrawn.json", 256


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
    together: Together = ALONE,
) -> None:
    """Write `draws` latents of every picture, as FAR draws them under the picture's class.

    Draw k begins with the picture's own latents and draws the last 1 + k mod `levels` levels (their input low-passed,
    as always), so that what is drawn differs from the picture by no more than FAR's own errors there. Pictures are not
    mirrored. The folder holds shards [rows, draws, C, g, g] in float16, in the VAE's scale, and redrawn.json, and
    appears whole. A run that is ended goes on, and several processes share the shards. FarError if the folder exists,
    or model and pictures do not fit.
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
    check_classes(pictures.source, pictures.names, config.classes)
    info = SYSTEMS["far"].info(far, vae)
    steps = loop.plan(info, loop.settle(info, sampling))
    if levels > len(steps):
        raise FarError(f"--levels {levels}: {far_file} draws {len(steps)} levels")
    engine = TorchEngine(SYSTEMS["far"].stages(far, vae, info, None), str(next(far.parameters()).device))

    def redrawn(rows: NDArray[np.int64]) -> NDArray[np.float16]:
        mean, _ = encode(vae, pictures.pixels(rows))
        own = engine.put((config.latent_scale * mean).flatten(2).transpose(1, 2).contiguous().numpy())
        condition = label_condition(engine, pictures.labels[rows].tolist(), config.classes)
        found = []
        for draw in range(draws):
            noise = SeedNoise([int(row) * draws + draw for row in rows])
            last = steps[len(steps) - 1 - draw % levels :]
            drawn = np.asarray(engine.get(loop.run_steps(engine, info, last, condition, noise, latents=own)))
            found.append((drawn / config.latent_scale).transpose(0, 2, 1).reshape(mean.shape))
        if not np.isfinite(np.stack(found).astype(np.float16)).all():
            raise FarError(f"{far_file}: draws latents that are no numbers, or too large for float16; train it further")
        return np.stack(found, axis=1).astype(np.float16)

    count = len(pictures.labels)
    facts = {"pictures": pictures.source.name, "count": count, "rows": ROWS, "draws": draws, "levels": levels}
    facts |= {"sampling": dict(sampling), "far_sha256": file_digest(far_file), "encoder_sha256": encoder_digest(vae)}
    staging = begin(out, facts)
    write_shards(staging, count, ROWS, lambda rows: rows, redrawn, batch, say, together.rank, together.world)
    together.wait()
    if not together.rank:
        np.save(staging / "labels.npy", pictures.labels)
        write_json(staging / NOTES, facts)
        finish(staging, out)


def open_redrawn(path: Path, pictures: PictureSet, vae: AutoencoderKL) -> RedrawnSet:
    """Open a folder that `write_redrawn` wrote for these pictures; FarError if it is none, or of other pictures or
    another encoder."""
    try:
        notes = dict(json.loads((path / NOTES).read_text(encoding="utf-8")))
        draws, rows = int(notes["draws"]), int(notes["rows"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FarError(f"{path}: lacks a readable {NOTES}; make it with far train redraw-latents") from error
    if notes.get("encoder_sha256") != encoder_digest(vae):
        raise FarError(
            f"{path}: made with another encoder than the one that is trained; give that VAE as --init, with "
            "--freeze-encoder, or make it again with far train redraw-latents"
        )
    labels = load_array(path / "labels.npy")
    if not np.array_equal(labels, pictures.labels):
        raise FarError(f"{path}: made for other pictures than {pictures.source}; make it again")
    shards, grid = Shards(path, len(labels), rows), pictures.size // vae.config.stride
    wanted = (len(labels), draws, vae.config.channels, grid, grid)
    if shards.shape != wanted:
        raise FarError(f"{path}: shards of {list(shards.shape)}; expected {list(wanted)}; make it again")

    def latents(rows: NDArray[np.int64], draw: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(shards[rows][np.arange(len(rows)), draw].astype(np.float32))

    return RedrawnSet(path, draws, latents)


def encoder_digest(vae: AutoencoderKL) -> str:
    """SHA-256 of the weights that make latents: a VAE whose decoder was trained further has the same."""
    digest = hashlib.sha256()
    for part in (vae.encoder, vae.quant_conv):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
