"""Sample sheets while training: the project's one sampling loop on the torch engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from far_export.stages import SYSTEMS
from far_export.stages.far import denoise_stage
from far_export.stages.vae import decode_stage
from far_export.torch_engine import TorchEngine
from far_models.reconstruction import save_picture, tile
from far_models.var_hybrid import VARHybrid
from far_runtime.conditioning.text import context_condition
from far_runtime.sampling.base import Step, label_condition
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.pyramid import progress
from far_runtime.sampling.reverse_diffusion import diffuse
from far_runtime.sampling.solvers import Diffusion
from far_runtime.sampling.systems import SAMPLERS
from far_training.data.prompts import TextSet
from far_training.loop.task import Report

FIRST_SEED = 1000
SHEET_PICTURES = 64
SHEET_COLUMNS = 16


def sample_pictures(
    system: str,
    model: nn.Module,
    vae: nn.Module,
    labels: Sequence[int],
    seeds: Sequence[int],
    batch: int = 32,
    features: NDArray[np.float32] | None = None,
    **sampling: Any,
) -> NDArray[np.uint8]:
    """Pictures uint8 [n, S, S, 3] of `labels` [n], one per seed, drawn by the loop of `system`.

    batch: pictures that are drawn at a time.
    features: of prompts [texts, T, width], for a system that is conditioned on text; `labels` are their numbers then.
    sampling: settings of the loop, by name.
    """
    info = SYSTEMS[system].info(model, vae)
    loop = SAMPLERS[system]
    plan = loop.plan(info, loop.resolve_settings(info, sampling))
    engine = TorchEngine(SYSTEMS[system].stages(model, vae, info, None), str(next(model.parameters()).device))
    pictures = []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        if features is None:
            condition = label_condition(engine, labels[part], info.classes)
        else:
            texts = list(labels[part])
            condition = context_condition(engine, engine.put(features), texts, [None] * len(texts))
        latents = loop.sample(engine, info, plan, condition, SeedNoise(list(seeds[part])))
        pictures.append(np.asarray(engine.get(engine.run("decode", {"latents": latents})["pixels"])))
    return np.concatenate(pictures)


def sample_hybrid(
    model: VARHybrid,
    vae: nn.Module,
    labels: Sequence[int],
    seeds: Sequence[int],
    batch: int = 32,
    steps: int = 25,
    guidance: float = 1.0,
    temperature: float = 1.0,
) -> NDArray[np.uint8]:
    """Pictures uint8 [n, S, S, 3] of `labels` [n], one per seed, drawn by a hybrid, scale by scale.

    batch: pictures that are drawn at a time.
    steps: diffusion steps at each scale.
    guidance: scale at the last map; it rises from 1 at the first, as VAR's does.
    """
    config = model.config
    stages = [denoise_stage(model, "tokens"), decode_stage(vae, config.grid, config.latent_scale)]
    engine = TorchEngine(stages, str(model.gain.device))
    sides = config.patch_nums
    pictures = []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        noise, classes = SeedNoise(list(seeds[part])), np.asarray(labels[part], np.int64)
        if guidance != 1:
            classes = np.concatenate([classes, np.full_like(classes, config.classes)])

        def denoise(scale: int, condition: Tensor, noise: SeedNoise = noise) -> Tensor:
            side = sides[scale]
            scale_guidance = 1 + (guidance - 1) * progress(scale, len(sides))
            step = Step(
                scale, "scale", side, steps, scale_guidance, {}, (), diffusion=Diffusion(steps, temperature=temperature)
            )
            drawn = diffuse(engine, condition, step, noise, (side * side, config.channels), config.prediction)
            assert isinstance(drawn, Tensor)
            return drawn

        latents = model.generate(torch.from_numpy(classes).to(model.gain.device), denoise)
        pictures.append(np.asarray(engine.get(engine.run("decode", {"latents": latents})["pixels"])))
    return np.concatenate(pictures)


def sheet_reporter(system: str, vae: nn.Module, **sampling: Any) -> Report:
    """A task's `report` that draws one picture of each of the first classes."""

    def draw(model: nn.Module) -> NDArray[np.uint8]:
        labels = list(range(min(SHEET_PICTURES, model.config.classes)))
        seeds = [FIRST_SEED + label for label in labels]
        if isinstance(model, VARHybrid):
            return sample_hybrid(model, vae, labels, seeds, **sampling)
        return sample_pictures(system, model, vae, labels, seeds, **sampling)

    return sheet_writer(draw)


def prompt_reporter(vae: nn.Module, text: TextSet, labels: NDArray[np.int64], **sampling: Any) -> Report:
    """A task's `report` that draws the first prompt of each of the first classes; `labels` [N] are the pictures'."""
    _, first_rows = np.unique(labels, return_index=True)
    features = np.array(text.features[text.index[first_rows[:SHEET_PICTURES]]])

    def draw(model: nn.Module) -> NDArray[np.uint8]:
        numbers = list(range(len(features)))
        seeds = [FIRST_SEED + number for number in numbers]
        return sample_pictures("far_t2i", model, vae, numbers, seeds, features=features, **sampling)

    return sheet_writer(draw)


def sheet_writer(draw: Callable[[nn.Module], NDArray[np.uint8]]) -> Report:
    """A task's `report` that writes what `draw` gives as a sheet."""

    def report(model: nn.Module, step: int, folder: Path) -> dict[str, float]:
        sheet = tile(draw(model), SHEET_COLUMNS)
        save_picture(sheet, folder / "sheets" / f"samples-{step:06d}.png")
        return {}

    return report
