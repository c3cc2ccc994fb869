"""Training of VAR: all scales at once, each predicted from the coarser ones (VAR section 3.2; official trainer.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from far_models.checkpoint.save import export_checkpoint, metadata_of
from far_models.var import VAR, VARConfig
from far_models.vq_vae import VQVAE
from far_runtime.errors import FarError
from far_training.data.tokens import TokenSet
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Report, Task
from far_training.systems.batches import check_classes, labels_or_null, run_args, sample_rows
from far_training.systems.settings import VARLossSettings

NO_DECAY = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul")


class VARLosses(nn.Module):
    """Cross entropy in nats, its mean over all tokens and over those of every scale."""

    def __init__(self, model: VAR, vqvae: VQVAE, smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.quantize = vqvae.quantize.requires_grad_(False)
        self.smoothing = smoothing

    def forward(self, labels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The loss [], the accuracy [] and the entropy [] of every scale, for labels [B] and tokens [B, L]."""
        # The sampling loop computes the inputs in float32 too.
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            inputs = self.quantize.inputs(tokens)
        logits = self.model(labels, inputs).float().transpose(1, 2)
        terms = F.cross_entropy(logits, tokens, reduction="none", label_smoothing=self.smoothing)
        correct = logits.detach().argmax(1) == tokens
        return {"loss": terms.mean(), "accuracy": correct.float().mean()} | per_scale(self.model, "entropy", terms)


def per_scale(model: VAR, name: str, terms: Tensor) -> dict[str, Tensor]:
    """The mean [] of terms [B, L] at every scale, for the log."""
    pairs = zip(model.config.patch_nums, model.ranges, strict=True)
    return {f"{name}_{side:02d}": terms[:, start:end].detach().mean() for side, (start, end) in pairs}


def var_task(
    config: VARConfig,
    settings: VARLossSettings,
    data: TokenSet,
    vqvae: VQVAE,
    batch: int,
    seed: int,
    report: Report,
    sampling: Mapping[str, Any] | None = None,
) -> Task:
    """Training of a VAR on the tokens of a VQ-VAE, which stays as it is; the parameters are those of `far_task`."""
    check_classes(data.source, data.names, config.classes)
    sizes = (config.patch_nums, config.channels, config.vocabulary)
    vqvae_sizes = (vqvae.config.patch_nums, vqvae.config.channels, vqvae.config.vocabulary)
    if sizes != vqvae_sizes:
        raise FarError(f"the model's scales, channels and vocabulary are {sizes}; the VQ-VAE's are {vqvae_sizes}")
    torch.manual_seed(seed)
    model = VAR(config, settings.drop_path).initialize(settings.gain)

    def fetch(rng: SampleRng, progress: float) -> tuple[Tensor, ...]:
        rows = sample_rows(data.train, batch, rng)
        mirrored = rng.bernoulli(settings.flip_share(progress)).numpy()
        labels = labels_or_null(data.labels[rows], config.classes, settings.label_drop, rng)
        return labels, data.tokens(rows, mirrored)

    def finish(average: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(average, folder / "var.safetensors", data.names, summary, sampling=sampling)

    return Task(
        system="var",
        model=model,
        losses=VARLosses(model, vqvae, settings.smoothing),
        fetch=fetch,
        epoch_length=len(data.train),
        args=run_args("var", config, settings),
        report=report,
        finish=finish,
        no_decay=NO_DECAY,
        metadata=metadata_of(model, data.names, sampling),
    )
