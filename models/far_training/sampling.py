"""Sample sheets while training: the project's one sampling loop on the torch engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from far_models.reconstruction import save_picture, tile
from far_models.var_hybrid import VARHybrid
from far_training.data.prompts import TextSet

Report = Callable[[nn.Module, int, Path], dict[str, float]]
FIRST_SEED = 1000


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
    """Pictures uint8 [n, S, S, 3] of `labels`, one seed each, by the loop of `system` with the given settings.

    features [texts, T, width]: of prompts, for a system that is conditioned on text; `labels` number them then.
    """
    from far_export.stages import SYSTEMS
    from far_export.torch_engine import TorchEngine
    from far_runtime.conditioning.text import context_condition
    from far_runtime.sampling.base import label_condition
    from far_runtime.sampling.noise import SeedNoise
    from far_runtime.sampling.systems import SAMPLERS

    info = SYSTEMS[system].info(model, vae)
    loop = SAMPLERS[system]
    plan = loop.plan(info, loop.resolve_settings(info, sampling))
    engine = TorchEngine(SYSTEMS[system].stages(model, vae, info, None), str(next(model.parameters()).device))
    found = []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        if features is None:
            condition = label_condition(engine, labels[part], info.classes)
        else:
            texts = list(labels[part])
            condition = context_condition(engine, engine.put(features), texts, [None] * len(texts))
        latents = loop.sample(engine, info, plan, condition, SeedNoise(list(seeds[part])))
        found.append(np.asarray(engine.get(engine.run("decode", {"latents": latents})["pixels"])))
    return np.concatenate(found)


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
    """Pictures uint8 [n, S, S, 3] of `labels` by a hybrid, scale by scale through the project's reverse diffusion.

    guidance: rises from 1 at the first scale to this at the last, as VAR's does.
    """
    from far_export.stages.far import denoise_stage
    from far_export.stages.vae import decode_stage
    from far_export.torch_engine import TorchEngine
    from far_runtime.sampling.base import Step
    from far_runtime.sampling.noise import SeedNoise
    from far_runtime.sampling.pyramid import progress
    from far_runtime.sampling.reverse_diffusion import diffuse
    from far_runtime.sampling.solvers import Diffusion

    config = model.config
    stages = [denoise_stage(model, "tokens"), decode_stage(vae, config.grid, config.latent_scale)]
    engine = TorchEngine(stages, str(model.gain.device))
    sides, found = config.patch_nums, []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        noise, own = SeedNoise(list(seeds[part])), np.asarray(labels[part], np.int64)
        rows = own if guidance == 1 else np.concatenate([own, np.full_like(own, config.classes)])

        def denoise(scale: int, condition: Tensor, noise: SeedNoise = noise) -> Tensor:
            side = sides[scale]
            at = 1 + (guidance - 1) * progress(scale, len(sides))
            step = Step(scale, "scale", side, steps, at, {}, (), diffusion=Diffusion(steps, temperature=temperature))
            drawn = diffuse(engine, condition, step, noise, (side * side, config.channels), config.prediction)
            assert isinstance(drawn, Tensor)
            return drawn

        latents = model.generate(torch.from_numpy(rows).to(model.gain.device), denoise)
        found.append(np.asarray(engine.get(engine.run("decode", {"latents": latents})["pixels"])))
    return np.concatenate(found)


def sheet_reporter(system: str, vae: nn.Module, count: int = 64, **sampling: Any) -> Report:
    """The trainer's report hook: one picture of each of the first `count` classes."""

    def draw(ema: nn.Module) -> NDArray[np.uint8]:
        labels = list(range(min(count, ema.config.classes)))
        seeds = [FIRST_SEED + label for label in labels]
        if isinstance(ema, VARHybrid):
            return sample_hybrid(ema, vae, labels, seeds, **sampling)
        return sample_pictures(system, ema, vae, labels, seeds, **sampling)

    return saving(draw)


def prompt_reporter(
    vae: nn.Module, text: TextSet, labels: NDArray[np.int64], count: int = 64, **sampling: Any
) -> Report:
    """The trainer's report hook for FAR-T2I: a picture of the first prompt of each of the first `count` classes."""
    _, first = np.unique(labels, return_index=True)
    wanted = text.index[first[:count]]
    features = np.array(text.features[wanted])

    def draw(ema: nn.Module) -> NDArray[np.uint8]:
        numbers = list(range(len(wanted)))
        seeds = [FIRST_SEED + number for number in numbers]
        return sample_pictures("far_t2i", ema, vae, numbers, seeds, features=features, **sampling)

    return saving(draw)


def saving(draw: Callable[[nn.Module], NDArray[np.uint8]]) -> Report:
    """A report hook that writes what `draw` gives as a sheet."""

    def report(ema: nn.Module, step: int, folder: Path) -> dict[str, float]:
        save_picture(tile(draw(ema), 16), folder / "sheets" / f"samples-{step:06d}.png")
        return {}

    return report
