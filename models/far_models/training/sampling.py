"""Sample sheets while training: the project's one sampling loop on the torch engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from far_models.training.sheets import save_picture, tile


def sample_pictures(
    system: str,
    model: nn.Module,
    vae: nn.Module,
    labels: Sequence[int],
    seeds: Sequence[int],
    batch: int = 32,
    **sampling: Any,
) -> NDArray[np.uint8]:
    """Pictures uint8 [n, S, S, 3] of `labels`, one seed each, by the loop of `system` with the given settings."""
    from far_export.graphs import SYSTEMS
    from far_export.torch_engine import TorchEngine
    from far_runtime.noise import SeedNoise
    from far_runtime.samplers import SAMPLERS
    from far_runtime.samplers.base import label_condition

    info = SYSTEMS[system].info(model, vae)
    loop = SAMPLERS[system]
    settings = loop.settle(info, sampling)
    engine = TorchEngine(SYSTEMS[system].stages(model, vae, info, None), str(next(model.parameters()).device))
    found = []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        condition = label_condition(engine, labels[part], info["classes"])
        latents = loop.sample(engine, info, settings, condition, SeedNoise(list(seeds[part])))
        found.append(np.asarray(engine.get(engine.run("decode", {"latents": latents})["pixels"])))
    return np.concatenate(found)


def sheet_reporter(
    system: str, vae: nn.Module, count: int = 64, **sampling: Any
) -> Callable[[nn.Module, int, Path], dict[str, float]]:
    """The trainer's report hook: one picture of each of the first `count` classes."""

    def report(ema: nn.Module, step: int, folder: Path) -> dict[str, float]:
        labels = list(range(min(count, ema.config.classes)))
        pictures = sample_pictures(system, ema, vae, labels, [1000 + label for label in labels], **sampling)
        save_picture(tile(pictures, 16), folder / "sheets" / f"samples-{step:06d}.png")
        return {}

    return report
