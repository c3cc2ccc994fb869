"""Trained checkpoints as small .safetensors files whose metadata has everything to rebuild the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from far_models.checkpoint.load import check_tensors, load_checkpoint
from far_models.far import FAR
from far_models.far_t2i import FART2I
from far_models.kl_vae import AutoencoderKL
from far_models.mar import MAR
from far_models.var import VAR
from far_models.vq_vae import VQVAE
from far_runtime.errors import FarError
from far_runtime.storage.atomic import check_folder, whole_file

FORMAT = "far-deploy"
SYSTEM_OF: dict[type[nn.Module], str] = {
    FAR: "far",
    FART2I: "far_t2i",
    MAR: "mar",
    VAR: "var",
    VQVAE: "vqvae",
    AutoencoderKL: "klvae",
}


def metadata_of(
    model: nn.Module, classes: Sequence[str] = (), sampling: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The metadata of a checkpoint.

    "format" and "system" (a key of far_models.checkpoint.load.SYSTEMS) are plain text; "config" (the dataclass fields),
    "classes" (names by label) and "sampling" (settings that become a bundle's defaults) are JSON.
    """
    return {
        "format": FORMAT,
        "system": SYSTEM_OF[type(model)],
        "config": json.dumps(asdict(model.config)),
        "classes": json.dumps(list(classes)),
        "sampling": json.dumps(dict(sampling or {})),
    }


def export_checkpoint(
    model: nn.Module,
    path: Path,
    classes: Sequence[str],
    training: Mapping[str, Any],
    half: bool = True,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write a model of any system as .safetensors, whole or not at all.

    training: a summary of the training, written as JSON into the metadata beside `metadata_of`'s entries.
    half: float16, else float32.

    Raises FarError where a weight does not fit float16 or the file cannot be written.
    """
    from safetensors.torch import save_file

    dtype = torch.float16 if half else torch.float32
    tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    too_large = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if too_large:
        raise FarError(f"{path}: {', '.join(too_large)} cannot be stored in float16")
    metadata = {**metadata_of(model, classes, sampling), "training": json.dumps(dict(training))}
    check_folder(path.parent)
    with whole_file(path) as aside:
        save_file(tensors, aside, metadata)
        # safetensors makes files that only their owner can read.
        aside.chmod(0o644)


def load_initial_weights(model: nn.Module, path: Path | None) -> None:
    """Load the weights of a checkpoint into a new model, unless `path` is None; FarError for a checkpoint of another
    system or of other sizes."""
    if path is None:
        return
    loaded = load_checkpoint(path, expect=SYSTEM_OF[type(model)]).model.state_dict()
    check_tensors(path, {name: p.shape for name, p in model.state_dict().items()}, loaded)
    model.load_state_dict(loaded)
