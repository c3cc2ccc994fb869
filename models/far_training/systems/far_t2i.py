"""Training of FAR-T2I: FAR's loss at a level per sample, under a prompt and always masked (official
models/far_t2i.py)."""

from __future__ import annotations

from collections.abc import Mapping
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
from far_training.loop.task import Report, Task
from far_training.systems.batches import check_latents, diffusion_draws, latent_batch, run_args
from far_training.systems.far import LevelLoss
from far_training.systems.masks import levels_of, random_count, visible_indices
from far_training.systems.settings import FART2ILossSettings


class FART2ILosses(nn.Module):
    """FAR-T2I's losses of a batch, as `far_t2i_task` fetches it."""

    def __init__(self, model: FART2I, settings: FART2ILossSettings) -> None:
        super().__init__()
        self.model = model
        self.level = LevelLoss(model.config.grid, model.config.prediction, settings)

    def forward(
        self,
        latents: Tensor,
        noisy: Tensor,
        text: Tensor,
        null: Tensor,
        levels: Tensor,
        visible: Tensor,
        t: Tensor,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """The loss [] and its terms.

        latents, noisy, levels: as in LevelLoss.
        text: features [B, T, W] of the prompts.
        null: [B], 1 where the sample is trained without its prompt.
        visible: indices [B, V] of the tokens that the encoder sees.
        t, noise: as in `token_losses`.
        """
        context = self.model.context(text, null)

        def features(inputs: Tensor) -> Tensor:
            if not visible.shape[1]:  # as at the first step of the sampling loop
                return self.model.features(None, context)
            return self.model.features(inputs, context, visible, restore_indices(visible, inputs.shape[1]))

        return self.level(self.model.diffloss.net, latents, noisy, levels, (t, noise), features)


def far_t2i_task(
    config: FART2IConfig,
    settings: FART2ILossSettings,
    data: LatentSet,
    text: TextSet,
    batch: int,
    seed: int,
    report: Report,
    sampling: Mapping[str, Any] | None = None,
) -> Task:
    """Training of a FAR-T2I on latents and the features of their prompts; the parameters are those of `far_task`."""
    check_latents(data, config.channels, config.grid)
    if text.features.shape[1:] != (config.context_tokens, config.context_width):
        raise FarError(
            f"{text.source}: text features {list(text.features.shape[1:])}; the model takes "
            f"[{config.context_tokens}, {config.context_width}]"
        )
    torch.manual_seed(seed)
    model = FART2I(config).initialize()

    def fetch(rng: SampleRng, progress: float) -> tuple[Tensor, ...]:
        samples = latent_batch(data, settings, config.latent_scale, batch, rng, progress)
        features = torch.from_numpy(np.array(text.features[text.index[samples.rows]]))
        null = rng.bernoulli(settings.text_drop).long()
        levels = levels_of(rng.uniform(), config.grid, settings.low)
        masked = random_count(settings.mask_least, config.tokens, rng.shared)
        visible = visible_indices(rng.uniform(config.tokens), config.tokens - masked)
        draws = diffusion_draws(config.tokens, config.channels, settings.draws, rng)
        return samples.latents, samples.noisy, features, null, levels, visible, *draws

    def finish(average: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        notes = {**summary, "text_encoder": text.encoder, "prompts": len(text.prompts)}
        export_checkpoint(average, folder / "far_t2i.safetensors", (), notes, sampling=sampling)

    return Task(
        system="far_t2i",
        model=model,
        losses=FART2ILosses(model, settings),
        fetch=fetch,
        epoch_length=len(data.train),
        args=run_args("far_t2i", config, settings),
        report=report,
        finish=finish,
        no_decay=("diffloss",),
        has_unused=True,  # the encoder, where nothing is visible
        metadata=metadata_of(model, (), sampling),
    )
