"""Training of FAR-T2I: FAR's loss at a level per sample, under a prompt and always masked (official
models/far_t2i.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from far_models.checkpoint.save import export_checkpoint, metadata_of
from far_models.far import restore_indices
from far_models.far_t2i import FART2I, FART2IConfig
from far_runtime.errors import FarError
from far_training.data.latents import LatentSet
from far_training.data.prompts import TextSet
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Task
from far_training.systems.batches import (
    check_latents,
    diffusion_draws,
    disturbed_latents,
    drawn_latents,
    rows_of,
    run_args,
)
from far_training.systems.far import LevelLoss
from far_training.systems.masks import draw_levels, random_count, visible_indices


@dataclass(frozen=True)
class FART2ILossSettings:
    """How FAR-T2I is trained.

    text_drop: share of samples that learn the null condition. mask_least: as in MARLossSettings, whatever the level (as
    in the released code). The others mean what they mean in FARLossSettings.
    """

    simplify: bool = True
    weight_levels: bool = True
    low: float = 0.0
    mask_least: float = 0.7
    text_drop: float = 0.1
    input_noise: float = 0.0
    draws: int = 1
    flip: float = 0.5
    flip_until: float = 1.0
    learned_variance: bool = True


class FART2ILosses(nn.Module):
    """Losses of scaled latents [B, C, g, g], the same as they are shown, text features [B, T, W] with null [B], levels
    [B], visible indices [B, V], and timesteps and noise of every token (`token_losses`)."""

    def __init__(self, model: FART2I, settings: FART2ILossSettings) -> None:
        super().__init__()
        self.model = model
        self.level = LevelLoss(
            model.config.grid,
            model.config.prediction,
            settings.simplify,
            settings.weight_levels,
            settings.learned_variance,
        )

    def forward(
        self,
        latents: Tensor,
        disturbed: Tensor,
        text: Tensor,
        null: Tensor,
        levels: Tensor,
        visible: Tensor,
        t: Tensor,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        context = self.model.context(text, null)

        def features(shown: Tensor) -> Tensor:
            if not visible.shape[1]:  # as at the first step of the sampling loop
                return self.model.features(None, context)
            return self.model.features(shown, context, visible, restore_indices(visible, shown.shape[1]))

        return self.level(self.model.diffloss.net, latents, disturbed, levels, (t, noise), features)


def far_t2i_task(
    config: FART2IConfig,
    settings: FART2ILossSettings,
    data: LatentSet,
    text: TextSet,
    batch: int,
    seed: int,
    report: Callable[[nn.Module, int, Path], dict[str, float]],
    sampling: Mapping[str, Any] | None = None,
) -> Task:
    """Training of a FAR-T2I on latents and the features of their prompts; see `far_task`."""
    check_latents(data, config.channels, config.grid)
    if text.features.shape[1:] != (config.context_tokens, config.context_width):
        raise FarError(
            f"{text.source}: text features {list(text.features.shape[1:])}; the model takes "
            f"[{config.context_tokens}, {config.context_width}]"
        )
    torch.manual_seed(seed)
    model = FART2I(config).initialize()
    losses = FART2ILosses(model, settings)

    def fetch(chance: SampleRng, done: float) -> tuple[Tensor, ...]:
        rows = rows_of(data.train, batch, chance)
        flip = settings.flip if done < settings.flip_until else 0.0
        latents = drawn_latents(data, rows, config.latent_scale, flip, chance)
        disturbed = disturbed_latents(latents, settings.input_noise, chance)
        features = torch.from_numpy(np.array(text.features[text.index[rows]]))
        null = chance.happens(settings.text_drop).long()
        levels = draw_levels(chance.uniform(), config.grid, settings.low)
        seen = config.tokens - random_count(settings.mask_least, config.tokens, chance.of_step)
        visible = visible_indices(chance.uniform(config.tokens), seen)
        draws = diffusion_draws(config.tokens, config.channels, settings.draws, chance)
        return latents, disturbed, features, null, levels, visible, *draws

    def finish(ema: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        notes = {**summary, "text_encoder": text.encoder, "prompts": len(text.prompts)}
        export_checkpoint(ema, folder / "far_t2i.safetensors", (), notes, sampling=sampling)

    return Task(
        "far_t2i",
        model,
        losses,
        fetch,
        len(data.train),
        run_args("far_t2i", config, settings),
        report,
        finish,
        no_decay=("diffloss",),
        unused=True,  # the encoder, where nothing is visible
        metadata=metadata_of(model, (), sampling),
    )
