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
from torch import Tensor, nn

from far_models.checkpoint.load import load_checkpoint
from far_models.kl_vae import AutoencoderKL
from far_models.pictures import PictureSet
from far_runtime.errors import FarError
from far_runtime.model_info import FarInfo
from far_runtime.storage.atomic import whole_file
from far_training.data.cache import file_digest, write_json
from far_training.data.latents import check_fit, encode
from far_training.data.shards import Shards, begin, finish, write_shards
from far_training.loop.processes import ALONE, ProcessGroup

NOTES, ROWS, COMMAND = "redrawn.json", 256, "redraw-latents"
LOOKED_AT = 64
"""Pictures whose pixels are compared, to tell whether a folder is of the pictures that are trained on."""


@dataclass(frozen=True)
class RedrawnSet:
    """Latents [n, C, g, g] of some pictures, in the VAE's own scale: latents(rows [n], draw [n]). digest: of what they
    were made of."""

    source: Path
    draws: int
    digest: str
    latents: Callable[[NDArray[np.int64], NDArray[np.int64]], Tensor]


def write_redrawn(
    far_file: Path,
    vae_file: Path,
    pictures: PictureSet,
    out: Path,
    draws: int,
    levels: int,
    batch: int,
    say: Callable[[str], None],
    sampling: Mapping[str, Any],
    together: ProcessGroup = ALONE,
) -> None:
    """Write `draws` latents of every picture, as FAR draws them under the picture's class.

    Draw k begins with the picture's own latents and draws the last 1 + k mod `levels` levels (their input low-passed,
    as always), so that what is drawn differs from the picture by no more than FAR's own errors there. Pictures are not
    mirrored. The folder holds shards [rows, draws, C, g, g] in float16, in the VAE's scale, and redrawn.json, and
    appears whole. A run that is ended goes on, and several processes share the shards. FarError if the folder exists,
    or models and pictures do not fit.
    """
    loaded, vae = load_checkpoint(far_file, expect="far"), load_checkpoint(vae_file, expect="klvae").model
    far = loaded.model
    check_fit(vae.config.stride, pictures)
    config, grid = far.config, pictures.size // vae.config.stride
    if (config.grid, config.channels) != (grid, vae.config.channels):
        raise FarError(
            f"{far_file}: draws latents of {config.channels} channels on {config.grid} x {config.grid}; the VAE gives "
            f"{vae.config.channels} on {grid} x {grid}"
        )
    if len(pictures.names) > config.classes or (loaded.classes and loaded.classes != pictures.names):
        raise FarError(f"{pictures.source}: its classes are not those of {far_file}; give the pictures it learned from")
    for model in (vae, far):
        model.to(together.device)
    redrawing = Redrawing(far, vae, sampling)
    if levels >= redrawing.levels:
        raise FarError(
            f"--levels {levels}: {far_file} draws {redrawing.levels}; with all of them nothing of the picture is left, "
            f"give at most {redrawing.levels - 1}"
        )

    def redrawn(rows: NDArray[np.int64]) -> NDArray[np.float16]:
        mean, _ = encode(vae, pictures.pixels(rows))
        found = np.stack(
            [
                redrawing.draw(mean, pictures.labels[rows], rows * draws + draw, 1 + draw % levels)
                for draw in range(draws)
            ],
            axis=1,
        )
        half: NDArray[np.float16] = found.astype(np.float16)
        if not np.isfinite(half).all():
            raise FarError(f"{far_file}: draws latents that are no numbers, or too large for float16; train it further")
        return half

    count = len(pictures.labels)
    facts = {"pictures_sha256": pictures_digest(pictures), "count": count, "rows": ROWS, "draws": draws}
    facts |= {"levels": levels, "sampling": dict(sampling), "far_sha256": file_digest(far_file)}
    facts["encoder_sha256"] = encoder_digest(vae)
    staging = begin(out, facts)
    write_shards(staging, count, ROWS, lambda rows: rows, redrawn, batch, say, together.rank, together.world)
    together.wait()
    if not together.rank:
        with whole_file(staging / NOTES) as aside:
            write_json(aside, facts)
        finish(staging, out)


def open_redrawn(path: Path, pictures: PictureSet, vae: AutoencoderKL) -> RedrawnSet:
    """Open a folder that `write_redrawn` wrote for these pictures; FarError if it is none, or of other pictures or
    another encoder."""
    try:
        notes = dict(json.loads((path / NOTES).read_text(encoding="utf-8")))
        count, draws, rows = (int(notes[key]) for key in ("count", "draws", "rows"))
        if min(count, draws, rows) < 1:
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FarError(f"{path}: lacks a readable {NOTES}; make it with far train {COMMAND}") from error
    if notes.get("encoder_sha256") != encoder_digest(vae):
        raise FarError(
            f"{path}: made with another encoder than the one of this run; give that VAE as --init, or make it again "
            f"with far train {COMMAND}"
        )
    if count != len(pictures.labels) or notes.get("pictures_sha256") != pictures_digest(pictures):
        raise FarError(f"{path}: made of other pictures than {pictures.source}; make it again with far train {COMMAND}")
    shards, grid = Shards(path, count, rows, COMMAND), pictures.size // vae.config.stride
    wanted = (count, draws, vae.config.channels, grid, grid)
    if shards.shape != wanted:
        raise FarError(f"{path}: shards of {list(shards.shape)}; expected {list(wanted)}; make it again")

    def latents(rows: NDArray[np.int64], draw: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(shards[rows][np.arange(len(rows)), draw].astype(np.float32))

    return RedrawnSet(path, draws, file_digest(path / NOTES), latents)


def pictures_digest(pictures: PictureSet) -> str:
    """SHA-256 of all labels and of some pictures' pixels."""
    count = len(pictures.labels)
    rows = np.linspace(0, count - 1, min(count, LOOKED_AT)).round().astype(np.int64)
    return hashlib.sha256(pictures.labels.tobytes() + pictures.read(rows).tobytes()).hexdigest()


def encoder_digest(vae: AutoencoderKL) -> str:
    """SHA-256 of the weights that make latents, as float16: a VAE whose decoder was trained further has the same."""
    digest = hashlib.sha256()
    for part in (vae.encoder, vae.quant_conv):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Redrawing:
    """Draws the last levels of pictures anew, with a FAR on the torch engine. levels: how many it draws in all."""

    def __init__(self, far: nn.Module, vae: nn.Module, sampling: Mapping[str, Any]) -> None:
        """sampling: settings of FAR's loop by name; FarError for ones that cannot be."""
        from far_export.stages import SYSTEMS
        from far_export.torch_engine import TorchEngine
        from far_runtime.sampling import far as loop

        info = SYSTEMS["far"].info(far, vae)
        assert isinstance(info, FarInfo)
        self.info, self.scale = info, far.config.latent_scale
        self.steps = loop.plan(self.info, loop.resolve_settings(self.info, sampling))
        self.levels = len(self.steps)
        stages = SYSTEMS["far"].stages(far, vae, self.info, None)
        self.engine = TorchEngine(stages, str(next(far.parameters()).device))

    def draw(
        self, latents: Tensor, labels: NDArray[np.int64], seeds: NDArray[np.int64], last: int
    ) -> NDArray[np.float32]:
        """Latents [n, C, g, g] in the VAE's scale that end what begins with `latents` (of this shape and scale): their
        `last` levels, under these labels, a seed each."""
        from far_runtime.sampling import far as loop
        from far_runtime.sampling.base import label_condition
        from far_runtime.sampling.noise import SeedNoise

        engine = self.engine
        own = engine.put((self.scale * latents).flatten(2).transpose(1, 2).contiguous().numpy())
        condition = label_condition(engine, labels.tolist(), self.info.classes)
        noise, steps = SeedNoise(seeds.tolist()), self.steps[self.levels - last :]
        drawn = np.asarray(engine.get(loop.sample(engine, self.info, steps, condition, noise, latents=own)))
        found: NDArray[np.float32] = (drawn / self.scale).transpose(0, 2, 1).reshape(latents.shape)
        return found
