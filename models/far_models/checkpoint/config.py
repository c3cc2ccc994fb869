"""The configurations of FAR, MAR and KL-VAE from their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from far_models.checkpoint.file import Contents
from far_models.checkpoint.settings import (
    argument_settings,
    autoencoder_ranks,
    autoencoder_sizes,
    check_setting,
    count_modules,
    far_sizes,
    read_shapes,
    stated_settings,
)
from far_models.far import FAR, PRESETS, FARConfig
from far_models.kl_vae import AutoencoderKL, VAEConfig
from far_models.mar import PRESETS as MAR_PRESETS
from far_runtime.errors import FarError

FAR_RANKS = {
    "z_proj.weight": 2,
    "decoder_embed.weight": 2,
    "diffusion_pos_embed_learned": 3,
    "encoder_pos_embed_learned": 3,
    "class_emb.weight": 2,
    "encoder_blocks.0.mlp.fc1.weight": 2,
    "decoder_blocks.0.mlp.fc1.weight": 2,
    "diffloss.net.input_proj.weight": 2,
}
"""The tensors that state the sizes of a FAR, and their numbers of dimensions."""
FAR_ARGUMENTS = {
    "encoder_heads": "encoder_heads",
    "decoder_heads": "decoder_heads",
    "prediction": "prediction",
    "latent_scale": "latent_scale",
    "filter": "filter",
    "mask": "masked",
}
"""The settings that FAR's tensors do not state, by the names of the training arguments that do."""


def far_config(
    contents: Contents, overrides: Mapping[str, Any] | None = None, presets: Mapping[str, FARConfig] = PRESETS
) -> FARConfig:
    """Sizes and settings of a FAR checkpoint.

    Raises FarError where the tensors are not FAR's, a setting is not allowed, or nothing states the numbers of heads or
    whether the model is masked.
    """
    sizes = _far_sizes(contents)
    settings = argument_settings(contents, FAR_ARGUMENTS) | stated_settings(contents, FARConfig, overrides or {}, sizes)
    for part in ("encoder", "decoder"):
        name, width = f"{part}_heads", sizes[f"{part}_width"]
        if name not in settings:
            settings[name] = _preset_heads(contents, part, width, presets)
        if width % settings[name]:
            raise FarError(f"--config {name}={settings[name]}: does not divide the {part}'s width {width}")
    if "masked" not in settings:
        raise FarError(
            f"{contents.path}: does not say whether the model is the masked variant (both have the same tensors); "
            "give it: --config masked=true or masked=false"
        )
    return replace(FARConfig(), **{**settings, **sizes})


def mar_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> FARConfig:
    """Sizes and settings of a MAR checkpoint, as `far_config`; it is always masked, and FarError where the overrides
    say otherwise."""
    settings = {"masked": True, **(overrides or {})}
    if not check_setting("masked", settings["masked"], "bool", "--config"):
        raise FarError(
            f"--config masked={settings['masked']}: {contents.path.name} is a MAR, which is masked; leave it out"
        )
    return far_config(contents, settings, MAR_PRESETS)


def vae_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> VAEConfig:
    """Sizes of a KL-VAE checkpoint; FarError where the tensors are not a KL-VAE's."""
    ranks = {**autoencoder_ranks(contents), "post_quant_conv.weight": 4}
    shapes = read_shapes(contents, ranks, AutoencoderKL, VAEConfig())
    lowest = count_modules(contents, "encoder.down.") - 1
    sizes = {
        **autoencoder_sizes(contents, shapes),
        "channels": shapes["post_quant_conv.weight"][0],
        "encoder_attention": f"encoder.down.{lowest}.attn.0.q.weight" in contents.tensors,
    }
    return replace(VAEConfig(), **{**stated_settings(contents, VAEConfig, overrides or {}, sizes), **sizes})


def _far_sizes(contents: Contents) -> dict[str, Any]:
    shapes = read_shapes(contents, FAR_RANKS, FAR, FARConfig())
    sizes = far_sizes(contents, shapes)
    positions, tokens = list(shapes["encoder_pos_embed_learned"]), sizes["grid"] ** 2
    if positions[1] < tokens:
        raise FarError(
            f"{contents.path}: encoder_pos_embed_learned is {positions}; expected at least {tokens} positions"
        )
    return {
        **sizes,
        "classes": shapes["class_emb.weight"][0],
        "buffer": positions[1] - tokens,
        "mlp_ratio": shapes["encoder_blocks.0.mlp.fc1.weight"][0] / sizes["encoder_width"],
    }


def _preset_heads(contents: Contents, part: str, width: int, presets: Mapping[str, FARConfig]) -> int:
    """The number of heads of encoder or decoder in the preset that the training arguments name, else in the preset of
    this width; FarError where there is neither."""
    by_width = {preset.encoder_width: preset.encoder_heads for preset in presets.values()}
    named = presets.get(str(contents.args.get("model", "")))
    if named is not None and getattr(named, f"{part}_width") == width:
        return int(getattr(named, f"{part}_heads"))
    if width not in by_width:
        raise FarError(
            f"{contents.path}: the number of attention heads cannot be read from the weights and width {width} is no "
            f"preset's ({', '.join(map(str, by_width))}); give it: --config {part}_heads=N (or heads=N)"
        )
    return by_width[width]
