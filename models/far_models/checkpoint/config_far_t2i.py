"""The configuration of a FAR-T2I from its checkpoint, whose tensors state all sizes, the numbers of heads too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from far_models.checkpoint.file import Contents
from far_models.checkpoint.settings import argument_settings, far_sizes, metadata_entry, read_shapes, stated_settings
from far_models.far_t2i import FART2I, FART2IConfig
from far_runtime.errors import FarError

RANKS = {
    "context_embed.weight": 2,
    "fake_latent": 3,
    "z_proj.weight": 2,
    "decoder_embed.weight": 2,
    "diffusion_pos_embed_learned": 3,
    "encoder_pos_embed_learned": 3,
    "encoder_blocks.0.attn1.to_q.weight": 2,
    "encoder_blocks.0.ff.net.0.proj.weight": 2,
    "decoder_blocks.0.attn1.to_q.weight": 2,
    "diffloss.net.input_proj.weight": 2,
}
"""The tensors that state the sizes, and their numbers of dimensions."""


def far_t2i_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> FART2IConfig:
    """Sizes and settings of a FAR-T2I checkpoint.

    heads x head_dim is the inner width of attention; head_dim is 64 unless metadata or overrides say otherwise. Raises
    FarError where the tensors are not FAR-T2I's or a setting is not allowed.
    """
    sizes = _sizes(contents)
    stated = {**metadata_entry(contents, "config", {}), **(overrides or {})}
    head_dim = stated.get("head_dim", FART2IConfig.head_dim)
    # Of another type it is refused below, by `stated_settings`.
    if type(head_dim) is int and head_dim > 0:
        for part in ("encoder", "decoder"):
            inner = contents.tensors[f"{part}_blocks.0.attn1.to_q.weight"].shape[0]
            if inner % head_dim:
                raise FarError(
                    f"{contents.path}: {part}_blocks.0.attn1.to_q.weight has {inner} rows, no multiple of the head "
                    f"width {head_dim}; give the right one: --config head_dim=N"
                )
            sizes[f"{part}_heads"] = inner // head_dim
    arguments = argument_settings(contents, {name: name for name in ("prediction", "latent_scale")})
    settings = arguments | stated_settings(contents, FART2IConfig, overrides or {}, sizes)
    return replace(FART2IConfig(), **{**settings, **sizes})


def _sizes(contents: Contents) -> dict[str, Any]:
    shapes = read_shapes(contents, RANKS, FART2I, FART2IConfig())
    sizes = far_sizes(contents, shapes)
    positions, tokens = shapes["encoder_pos_embed_learned"][1], sizes["grid"] ** 2
    if positions != tokens:
        raise FarError(
            f"{contents.path}: encoder_pos_embed_learned has {positions} positions for {tokens} tokens; expected as "
            "many: FAR-T2I has no buffer tokens"
        )
    return {
        **sizes,
        "context_tokens": shapes["fake_latent"][1],
        "context_width": shapes["context_embed.weight"][1],
        "mlp_ratio": shapes["encoder_blocks.0.ff.net.0.proj.weight"][0] / sizes["encoder_width"],
    }
