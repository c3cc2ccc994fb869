"""A FAR-T2I model's configuration from its checkpoint: every size, the head counts too, is in the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from far_models.checkpoint.config import checked, count_of, json_entry, shapes_of, stated_settings
from far_models.checkpoint.file import Contents
from far_models.far import grid_of
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


def far_t2i_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> FART2IConfig:
    """Sizes and settings of a FAR-T2I checkpoint; FarError where the tensors are not FAR-T2I's or a setting is not
    allowed.

    heads x head_dim is the inner width of attention; head_dim is 64 unless metadata or overrides say otherwise.
    """
    sizes = _sizes(contents)
    stated = {**json_entry(contents, "config", {}), **(overrides or {})}
    head_dim = stated.get("head_dim", FART2IConfig.head_dim)
    for part in ("encoder", "decoder"):
        inner = contents.tensors[f"{part}_blocks.0.attn1.to_q.weight"].shape[0]
        if type(head_dim) is int and head_dim > 0:
            if inner % head_dim:
                raise FarError(
                    f"{contents.path}: {part}_blocks.0.attn1.to_q.weight has {inner} rows, no multiple of the head "
                    f"width {head_dim}; give the right one: --config head_dim=N"
                )
            sizes[f"{part}_heads"] = inner // head_dim
    settings = _arguments(contents) | stated_settings(contents, FART2IConfig, overrides or {}, sizes)
    return replace(FART2IConfig(), **{**settings, **sizes})


def _arguments(contents: Contents) -> dict[str, Any]:
    """The settings that the training arguments state, where they do."""
    args = {name: value for name, value in contents.args.items() if value is not None}
    if args.get("patch_size", 1) != 1:
        raise FarError(
            f"{contents.path}: patch_size {args['patch_size']}; the official sampler and this one know 1 only"
        )
    where, kinds = f"{contents.path}: args", {"prediction": "str", "latent_scale": "float"}
    return {name: checked(name, args[name], kind, where) for name, kind in kinds.items() if name in args}


def _sizes(contents: Contents) -> dict[str, Any]:
    shapes = shapes_of(contents, RANKS, FART2I, FART2IConfig())
    width, channels = shapes["z_proj.weight"]
    tokens, places = shapes["diffusion_pos_embed_learned"][1], shapes["encoder_pos_embed_learned"][1]
    try:
        grid = grid_of(tokens)
    except ValueError as error:
        shape = list(shapes["diffusion_pos_embed_learned"])
        raise FarError(f"{contents.path}: diffusion_pos_embed_learned is {shape}: {error}") from error
    if places != tokens:
        raise FarError(
            f"{contents.path}: encoder_pos_embed_learned has {places} places for {tokens} tokens; expected as many: "
            "FAR-T2I has no buffer tokens"
        )
    head_depth = count_of(contents, "diffloss.net.res_blocks.")
    if not head_depth:
        raise FarError(f"{contents.path}: no tensors called diffloss.net.res_blocks.*; is this a whole checkpoint?")
    return {
        "grid": grid,
        "channels": channels,
        "context_tokens": shapes["fake_latent"][1],
        "context_width": shapes["context_embed.weight"][1],
        "encoder_width": width,
        "encoder_depth": count_of(contents, "encoder_blocks."),
        "decoder_width": shapes["decoder_embed.weight"][0],
        "decoder_depth": count_of(contents, "decoder_blocks."),
        "mlp_ratio": shapes["encoder_blocks.0.ff.net.0.proj.weight"][0] / width,
        "head_width": shapes["diffloss.net.input_proj.weight"][0],
        "head_depth": head_depth,
    }
