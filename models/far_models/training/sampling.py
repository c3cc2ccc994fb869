"""Sample sheets while training: the project's one sampling loop on the torch engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from far_models.far import FAR
from far_models.kl_vae import AutoencoderKL
from far_models.training.sheets import save_picture, tile


def sample_pictures(
    far: FAR,
    vae: AutoencoderKL,
    labels: Sequence[int],
    seeds: Sequence[int],
    steps: str | int = 25,
    guidance: float = 2.0,
    batch: int = 32,
) -> NDArray[np.uint8]:
    """Pictures uint8 [n, S, S, 3] of `labels`, one seed each, at all levels (on a 16 x 16 grid the official ones)."""
    from far_export.graphs.far import stages
    from far_export.graphs.vae import decode_stage
    from far_export.torch_engine import TorchEngine
    from far_runtime.noise import SeedNoise
    from far_runtime.samplers.far import sample
    from far_runtime.schedule import make_schedule, official_levels

    config = far.config
    model = {
        "grid": config.grid,
        "channels": config.channels,
        "classes": config.classes,
        "masked": config.masked,
        "prediction": config.prediction,
    }
    schedule = make_schedule(
        official_levels(config.grid, config.masked),
        grid=config.grid,
        masked=config.masked,
        guidance=guidance,
        steps=steps,
    )
    device = str(next(far.parameters()).device)
    engine = TorchEngine([*stages(far), decode_stage(vae, config.grid, config.latent_scale)], device)
    found = []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        latents = sample(engine, model, schedule, list(labels[part]), SeedNoise(list(seeds[part])))
        found.append(np.asarray(engine.get(next(iter(engine.run("decode", {"latents": latents}).values())))))
    return np.concatenate(found)


def sheet_reporter(
    vae: AutoencoderKL, steps: str | int, guidance: float, count: int = 64
) -> Callable[[nn.Module, int, Path], dict[str, float]]:
    """The trainer's report hook: one picture of each of the first `count` classes."""

    def report(ema: nn.Module, step: int, folder: Path) -> dict[str, float]:
        assert isinstance(ema, FAR)
        labels = list(range(min(count, ema.config.classes)))
        pictures = sample_pictures(ema, vae, labels, [1000 + label for label in labels], steps, guidance)
        save_picture(tile(pictures, 16), folder / "sheets" / f"samples-{step:06d}.png")
        return {}

    return report
