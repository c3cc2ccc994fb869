"""Latents of pictures whose last levels FAR has redrawn, so that a decoder learns to forgive what FAR gets wrong."""

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

from far_export.stages import SYSTEMS
from far_export.torch_engine import TorchEngine
from far_models.checkpoint.load import load_checkpoint
from far_models.kl_vae import AutoencoderKL
from far_models.pictures import PictureSet
from far_runtime.bundle import sha256_of
from far_runtime.errors import FarError, SettingName
from far_runtime.model_info import FarInfo
from far_runtime.sampling import far as loop
from far_runtime.sampling.base import label_condition
from far_runtime.sampling.noise import SeedNoise
from far_training.data.cache import write_json
from far_training.data.latents import encode, latent_grid
from far_training.data.shards import ShardedArray, Shards, sharded_folder
from far_training.loop.display import Log
from far_training.loop.processes import ALONE, ProcessGroup

NOTES, ROWS, COMMAND = "redrawn.json", 256, "redraw-latents"
COMPARED_PICTURES = 64
"""Pictures whose pixels are compared, to tell whether a folder was made of the pictures that are trained on."""


@dataclass(frozen=True)
class RedrawnSet:
    """Redrawn latents of the pictures of a set."""

    source: Path
    """Folder of the latents."""
    draws: int
    """Redrawn latents per picture."""
    digest: str
    """SHA-256 of the notes that tell what they were made of."""
    latents: Callable[[NDArray[np.int64], NDArray[np.int64]], Tensor]
    """latents(rows [n], draws [n]): latents [n, C, g, g] in the VAE's scale."""


@dataclass(frozen=True)
class RedrawSettings:
    """How pictures are redrawn."""

    draws: int
    """Redrawn latents per picture."""
    levels: int
    """Largest number of last levels that are redrawn; draw k redraws 1 + k mod `levels` of them."""
    batch: int
    """Pictures that are redrawn at a time."""
    sampling: Mapping[str, Any]
    """Settings of FAR's sampling loop, by name."""


def write_redrawn(
    far_file: Path,
    vae_file: Path,
    pictures: PictureSet,
    out: Path,
    settings: RedrawSettings,
    log: Log,
    group: ProcessGroup = ALONE,
) -> None:
    """Write several redrawn latents of every picture, drawn under the picture's class.

    A draw begins with the picture's own latents, whose last levels are drawn again from their low-passed form. So it
    differs from the picture by no more than FAR's errors at these levels. Pictures are not mirrored. The folder holds
    shards [rows, draws, C, g, g] in float16, in the VAE's scale, and redrawn.json. It appears whole; an interrupted run
    goes on, and several processes share the shards. FarError if the folder exists, or models and pictures do not fit.
    """
    checkpoint, vae = load_checkpoint(far_file, expect="far"), load_checkpoint(vae_file, expect="klvae").model
    far = checkpoint.model
    check_models(far, vae, pictures, far_file)
    if len(pictures.names) > far.config.classes or (checkpoint.classes and checkpoint.classes != pictures.names):
        raise FarError(f"{pictures.source}: its classes are not those of {far_file}; give the pictures it learned from")
    redrawer = Redrawer(far.to(group.device), vae.to(group.device), settings.sampling)
    if settings.levels >= redrawer.levels:
        raise FarError(
            SettingName("levels"),
            f" {settings.levels}: {far_file} draws {redrawer.levels}; with all of them nothing of the picture "
            f"is left, give at most {redrawer.levels - 1}",
        )

    def redrawn(rows: NDArray[np.int64]) -> NDArray[np.float16]:
        mean, _ = encode(vae, pictures.pixels(rows))
        draws = [
            redrawer.draw(mean, pictures.labels[rows], rows * settings.draws + draw, 1 + draw % settings.levels)
            for draw in range(settings.draws)
        ]
        half: NDArray[np.float16] = np.stack(draws, axis=1).astype(np.float16)
        if not np.isfinite(half).all():
            raise FarError(f"{far_file}: draws latents that are no numbers, or too large for float16; train it further")
        return half

    count = len(pictures.labels)
    array = ShardedArray(count=count, rows=ROWS, read=lambda rows: rows, encode=redrawn, batch=settings.batch)
    facts = {"pictures_sha256": pictures_digest(pictures), "count": count, "rows": ROWS, "draws": settings.draws}
    facts |= {"levels": settings.levels, "sampling": dict(settings.sampling), "far_sha256": sha256_of(far_file)}
    facts["encoder_sha256"] = encoder_digest(vae)
    with sharded_folder(out, facts, array, log, group) as folder:
        if folder is not None:
            write_json(folder / NOTES, facts)


def check_models(far: nn.Module, vae: AutoencoderKL, pictures: PictureSet, far_file: Path) -> None:
    """FarError unless FAR draws latents as the VAE gives them for these pictures."""
    config, grid = far.config, latent_grid(vae.config.stride, pictures)
    if (config.grid, config.channels) != (grid, vae.config.channels):
        raise FarError(
            f"{far_file}: draws latents of {config.channels} channels on {config.grid} x {config.grid}; the VAE gives "
            f"{vae.config.channels} on {grid} x {grid}"
        )


def open_redrawn(path: Path, pictures: PictureSet, vae: AutoencoderKL) -> RedrawnSet:
    """Open a folder that `write_redrawn` wrote for these pictures; FarError for other pictures or another encoder."""
    try:
        notes = dict(json.loads((path / NOTES).read_text(encoding="utf-8")))
        count, draws, rows = (int(notes[key]) for key in ("count", "draws", "rows"))
        if min(count, draws, rows) < 1:
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FarError(f"{path}: lacks a readable {NOTES}; make it with far train {COMMAND}") from error
    if notes.get("encoder_sha256") != encoder_digest(vae):
        raise FarError(
            f"{path}: made with another encoder than the one of this run; give that VAE as ",
            SettingName("init"),
            f", or make it again with far train {COMMAND}",
        )
    if count != len(pictures.labels) or notes.get("pictures_sha256") != pictures_digest(pictures):
        raise FarError(f"{path}: made of other pictures than {pictures.source}; make it again with far train {COMMAND}")
    shards, grid = Shards(path, count, rows, COMMAND), pictures.size // vae.config.stride
    shape = (count, draws, vae.config.channels, grid, grid)
    if shards.shape != shape:
        raise FarError(f"{path}: shards of {list(shards.shape)}; expected {list(shape)}; make it again")

    def latents(rows: NDArray[np.int64], draw: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(shards.pick(rows, draw).astype(np.float32))

    return RedrawnSet(source=path, draws=draws, digest=sha256_of(path / NOTES), latents=latents)


def pictures_digest(pictures: PictureSet) -> str:
    """SHA-256 of all labels and of some pictures' pixels."""
    count = len(pictures.labels)
    rows = np.linspace(0, count - 1, min(count, COMPARED_PICTURES)).round().astype(np.int64)
    return hashlib.sha256(pictures.labels.tobytes() + pictures.read(rows).tobytes()).hexdigest()


def encoder_digest(vae: AutoencoderKL) -> str:
    """SHA-256 of the weights that make latents, as float16, which training the decoder further leaves the same."""
    digest = hashlib.sha256()
    for part in (vae.encoder, vae.quant_conv):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Redrawer:
    """Draws the last levels of pictures again, with a FAR on the torch engine."""

    def __init__(self, far: nn.Module, vae: nn.Module, sampling: Mapping[str, Any]) -> None:
        """sampling: settings of FAR's loop by name; FarError for invalid ones."""
        info = SYSTEMS["far"].info(far, vae)
        assert isinstance(info, FarInfo)
        self.info, self.scale = info, far.config.latent_scale
        self.steps = loop.plan(self.info, loop.resolve_settings(self.info, sampling))
        self.levels = len(self.steps)
        """Levels that FAR draws for a whole picture."""
        stages = SYSTEMS["far"].stages(far, vae, self.info, None)
        self.engine = TorchEngine(stages, str(next(far.parameters()).device))

    def draw(
        self, latents: Tensor, labels: NDArray[np.int64], seeds: NDArray[np.int64], last: int
    ) -> NDArray[np.float32]:
        """Latents [n, C, g, g] whose last levels are drawn again, in the VAE's scale.

        latents: the pictures' [n, C, g, g], in the VAE's scale.
        labels: classes [n] of the pictures.
        seeds: [n], one per picture.
        last: how many levels are drawn.
        """
        engine = self.engine
        own = engine.put((self.scale * latents).flatten(2).transpose(1, 2).contiguous().numpy())
        condition = label_condition(engine, labels.tolist(), self.info.classes)
        noise, steps = SeedNoise(seeds.tolist()), self.steps[self.levels - last :]
        drawn = np.asarray(engine.get(loop.sample(engine, self.info, steps, condition, noise, latents=own)))
        redrawn: NDArray[np.float32] = (drawn / self.scale).transpose(0, 2, 1).reshape(latents.shape)
        return redrawn
