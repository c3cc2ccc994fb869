"""What a bundle is made of: a generator's checkpoint, its VAE and its text encoder, loaded and found to fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far_export.stages import SYSTEMS
from far_models.checkpoint.load import Checkpoint, load_checkpoint
from far_runtime.errors import FarError, SettingName
from far_runtime.model_info import ModelInfo

if TYPE_CHECKING:
    from far_export.stages.text import TextPart


def load_pair(
    checkpoint: str | Path,
    vae: str | Path,
    weights: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    expect: str | None = None,
) -> tuple[Checkpoint, Checkpoint]:
    """A generator and the VAE that decodes its latents; FarError where the two do not fit each other.

    `weights` and `overrides` apply to the generator, as `load_checkpoint` takes them; `expect` names the system that
    it has to be of.
    """
    model = load_checkpoint(checkpoint, weights, overrides, expect)
    if model.system not in SYSTEMS:
        raise FarError(
            f"{checkpoint}: is a {model.system} checkpoint; expected {' or '.join(SYSTEMS)} (a VAE is given with ",
            SettingName("vae"),
            ")",
        )
    decoder = load_checkpoint(vae, expect=SYSTEMS[model.system].vae)
    model_channels, vae_channels = model.model.config.channels, decoder.model.config.channels
    if model_channels != vae_channels:
        raise FarError(
            f"{vae}: its latents have {vae_channels} channels, {checkpoint} draws latents of {model_channels}; give "
            "the VAE that the model was trained with"
        )
    return model, decoder


def check_weights(model: Checkpoint, requested: str | None) -> None:
    """FarError where weights were requested by name and the file has a single set without a name."""
    if requested is not None and model.source["weights"] != requested:
        raise FarError(
            SettingName("weights"),
            f" {requested}: {model.source['file']} has a single set of weights; leave ",
            SettingName("weights"),
            " out",
        )


def text_part(model: Checkpoint, info: ModelInfo, text_encoder: str | Path | None) -> TextPart | None:
    """What the text encoder in a folder adds to a bundle, None without a folder; FarError where it does not fit the
    model."""
    if text_encoder is None:
        return None
    if not info.takes_text:
        raise FarError(
            SettingName("text_encoder"),
            f" {text_encoder}: a {model.system} model draws from class labels; leave it out",
        )
    from far_export.stages.text import load_text_part

    return load_text_part(text_encoder, model.model.config)
