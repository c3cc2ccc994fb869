"""A text encoder as a part of a bundle: its stage, its tokenizer's file, and how prompts become tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from far_export.stages.flops import count_flops
from far_export.stages.stage import BATCH, Input, Stage
from far_models.far_t2i import FART2IConfig
from far_models.text.encoder import TextEncoder, load_text_encoder
from far_models.text.qwen2 import Qwen2
from far_runtime.bundle import TensorSpec
from far_runtime.conditioning.text import TOKENIZER
from far_runtime.errors import FarError
from far_runtime.model_info import TextSettings


@dataclass(frozen=True)
class TextPart:
    """What a text encoder adds to a bundle."""

    stage: Stage
    """The stage "text": token ids and mask to features."""

    files: Mapping[str, Path]
    """Files that are copied into the bundle, by their names there."""

    settings: TextSettings
    """How prompts become tokens, for the manifest's `model`."""

    source: Mapping[str, str]
    """Where the text encoder came from, for the manifest's `source`."""


def load_text_part(folder: str | Path, config: FART2IConfig) -> TextPart:
    """The text encoder of a Hugging Face folder, for a model with that configuration.

    Raises FarError as `load_text_encoder` does, and where its features have another width than the model's
    context_embed.
    """
    encoder = load_text_encoder(folder, config.context_tokens)
    if encoder.width != config.context_width:
        raise FarError(
            f"{folder}: its features are {encoder.width} wide, the checkpoint's context_embed takes "
            f"{config.context_width}; give the text encoder that the checkpoint was trained with"
        )
    files = {TOKENIZER: encoder.folder / TOKENIZER}
    return TextPart(text_stage(encoder), files, encoder.settings, {"folder": encoder.folder.resolve().name})


def text_stage(encoder: TextEncoder) -> Stage:
    """The text encoder over prompts that are padded to one length: ids and mask [B, prefix + T] -> features
    [B, T, width]."""
    tokens = encoder.settings.tokens
    length = len(encoder.settings.prefix) + tokens
    module = encoder.features
    rotary = isinstance(encoder.network, Qwen2)
    row = torch.empty(1, length, dtype=torch.int64, device="meta")
    return Stage(
        stage="text",
        module=module,
        inputs=(
            Input("ids", ("batch", length), "int64", encoder.network.config.vocabulary),
            Input("mask", ("batch", length), "int64", 2),
        ),
        outputs=(TensorSpec("features", "float32", ("batch", tokens, encoder.width)),),
        profile={"batch": BATCH},
        fp32_islands=("norm", "softmax", "rotation") if rotary else ("LayerNorm", "softmax"),
        flops={"": count_flops(module, (row, row))},
    )
