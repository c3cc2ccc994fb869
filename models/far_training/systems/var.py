"""Training of VAR: the tokens of all scales at once, each scale predicted from the coarser ones (VAR section 3.2;
official trainer.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from far_models.checkpoint.save import export_checkpoint, metadata_of
from far_models.var import VAR, VARConfig
from far_models.vq_vae import VQVAE
from far_runtime.errors import FarError
from far_training.data.tokens import TokenSet
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Task
from far_training.systems.batches import check_classes, dropped_labels, rows_of, run_args

NO_DECAY = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul")


@dataclass(frozen=True)
class VARLossSettings:
    """How VAR is trained.

    label_drop: share of samples that learn the null class. smoothing: of the targets. drop_path: rate of dropped
    branches at the last block. gain: see VAR.initialize. flip, flip_until: share of mirrored samples, and until which
    share of the run.
    """

    label_drop: float = 0.1
    smoothing: float = 0.0
    drop_path: float = 0.0
    gain: float = 1e-5
    flip: float = 0.0
    flip_until: float = 1.0


class VARLosses(nn.Module):
    """Cross entropy in nats of labels [B] and tokens [B, L], the mean over all tokens, and of every scale."""

    def __init__(self, model: VAR, vqvae: VQVAE, smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.quantize = vqvae.quantize.requires_grad_(False)
        self.smoothing = smoothing

    def forward(self, labels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):  # as they are when sampling
            inputs = self.quantize.inputs(tokens)
        logits = self.model(labels, inputs).float().transpose(1, 2)
        terms = functional.cross_entropy(logits, tokens, reduction="none", label_smoothing=self.smoothing)
        right = (logits.detach().argmax(1) == tokens).float().mean()
        return {"loss": terms.mean(), "accuracy": right} | per_scale(self.model, "entropy", terms)


def per_scale(model: VAR, name: str, terms: Tensor) -> dict[str, Tensor]:
    """The mean of terms [B, L] at every scale, for the log."""
    pairs = zip(model.config.patch_nums, model.ranges, strict=True)
    return {f"{name}_{side:02d}": terms[:, start:end].detach().mean() for side, (start, end) in pairs}


def var_task(
    config: VARConfig,
    settings: VARLossSettings,
    data: TokenSet,
    vqvae: VQVAE,
    batch: int,
    seed: int,
    report: Callable[[nn.Module, int, Path], dict[str, float]],
    sampling: Mapping[str, Any] | None = None,
) -> Task:
    """Training of a VAR on the tokens of a VQ-VAE, which stays as it is."""
    check_classes(data.source, data.names, config.classes)
    ours = (config.patch_nums, config.channels, config.vocabulary)
    theirs = (vqvae.config.patch_nums, vqvae.config.channels, vqvae.config.vocabulary)
    if ours != theirs:
        raise FarError(f"the model's scales, channels and vocabulary are {ours}; the VQ-VAE's are {theirs}")
    torch.manual_seed(seed)
    model = VAR(config, settings.drop_path).initialize(settings.gain)
    losses = VARLosses(model, vqvae, settings.smoothing)

    def fetch(chance: SampleRng, done: float) -> tuple[Tensor, ...]:
        rows = rows_of(data.train, batch, chance)
        flip = chance.happens(settings.flip if done < settings.flip_until else 0.0).numpy()
        labels = dropped_labels(data.labels[rows], config.classes, settings.label_drop, chance)
        return labels, data.tokens(rows, flip)

    def finish(ema: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(ema, folder / "var.safetensors", data.names, summary, sampling=sampling)

    return Task(
        "var",
        model,
        losses,
        fetch,
        len(data.train),
        run_args("var", config, settings),
        report,
        finish,
        no_decay=NO_DECAY,
        metadata=metadata_of(model, data.names, sampling),
    )
