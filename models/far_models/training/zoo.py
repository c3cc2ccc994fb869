"""Trained checkpoints as small .safetensors files with everything in the metadata that rebuilds the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from far_models.far import FAR
from far_runtime.errors import FarError

FORMAT = "far-deploy"


def export_checkpoint(
    model: nn.Module,
    path: Path,
    classes: Sequence[str],
    training: Mapping[str, Any],
    half: bool = True,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write a FAR or KL-VAE as .safetensors, in float16 or float32, whole or not at all.

    Metadata: format, system ("far" or "klvae"), and as JSON config (the dataclass fields), classes (names, FAR),
    training (a summary) and sampling (what a bundle takes as its default steps, guidance, ...). FarError where a weight
    does not fit float16 or the file cannot be written.
    """
    from safetensors.torch import save_file

    kind = torch.float16 if half else torch.float32
    tensors = {name: tensor.detach().cpu().to(kind).contiguous() for name, tensor in model.state_dict().items()}
    too_large = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if too_large:
        raise FarError(f"{path}: {', '.join(too_large)} cannot be stored in float16")
    metadata = {
        "format": FORMAT,
        "system": "far" if isinstance(model, FAR) else "klvae",
        "config": json.dumps(asdict(model.config)),
        "classes": json.dumps(list(classes)),
        "training": json.dumps(dict(training)),
        "sampling": json.dumps(dict(sampling or {})),
    }
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata)
        part.chmod(0o644)  # safetensors makes it private
        os.replace(part, path)
    except OSError as error:
        raise FarError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another file"
        ) from error
    finally:
        part.unlink(missing_ok=True)
