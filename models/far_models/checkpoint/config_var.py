"""VAR's and its VQ-VAE's configurations from their checkpoints: flat state dicts whose tensors state nearly all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from far_models.checkpoint.config import count_of, shapes_of, stated_settings
from far_models.checkpoint.file import Contents
from far_models.var import VAR, VARConfig
from far_models.vq_vae import VQVAE, VQVAEConfig
from far_runtime.errors import FarError
from far_runtime.sampling.pyramid import SCALES_256, SCALES_512

BUFFERS = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")
HEAD_WIDTH = 64
VAR_RANKS = {
    "pos_start": 3,
    "pos_1LC": 3,
    "word_embed.weight": 2,
    "class_emb.weight": 2,
    "lvl_embed.weight": 2,
    "head.weight": 2,
    "blocks.0.ffn.fc1.weight": 2,
}
VQVAE_RANKS = {"encoder.conv_in.weight": 4, "quantize.embedding.weight": 2, "post_quant_conv.weight": 4}


def parameters_of(contents: Contents) -> dict[str, Tensor]:
    """The file's tensors without the buffers that the official modules save beside their parameters."""
    return {name: t for name, t in contents.tensors.items() if name.rpartition(".")[2] not in BUFFERS}


def var_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> VARConfig:
    """Sizes of a VAR checkpoint; FarError where the tensors are not VAR's, a setting is not allowed, or the scales or
    the number of heads cannot be known.

    The scales are known from 680 or 2240 positions in ten levels; those of other models must be told.
    """
    shapes = shapes_of(contents, VAR_RANKS, VAR, VARConfig())
    width, channels = shapes["word_embed.weight"]
    scale = contents.tensors.get("blocks.0.attn.scale_mul_1H11")
    sizes: dict[str, Any] = {
        "channels": channels,
        "vocabulary": shapes["head.weight"][0],
        "classes": shapes["class_emb.weight"][0] - 1,
        "width": width,
        "depth": count_of(contents, "blocks."),
        "mlp_ratio": shapes["blocks.0.ffn.fc1.weight"][0] / width,
        "shared_aln": "shared_ada_lin.1.weight" in contents.tensors,
        "attn_l2_norm": scale is not None,
    }
    if sizes["classes"] < 1:
        raise FarError(f"{contents.path}: class_emb.weight has one row; expected the classes and the null class")
    if scale is not None:
        sizes["heads"] = scale.numel()
    settings = stated_settings(contents, VARConfig, overrides or {}, sizes)
    heads = settings.get("heads", sizes.get("heads", width // HEAD_WIDTH))
    if not heads or width % heads:
        raise FarError(
            f"{contents.path}: {heads} attention heads do not divide the width {width}; give their number: "
            "--config heads=N"
        )
    count, tokens, first = shapes["lvl_embed.weight"][0], shapes["pos_1LC"][1], shapes["pos_start"][1]
    patch_nums = settings.get("patch_nums") or _known_scales(contents, count, tokens)
    _check_scales(contents, patch_nums, count, tokens, first)
    return replace(VARConfig(), **{**settings, **sizes, "heads": heads, "patch_nums": patch_nums})


def _known_scales(contents: Contents, count: int, tokens: int) -> tuple[int, ...]:
    for scales in (SCALES_256, SCALES_512):
        if len(scales) == count and sum(side * side for side in scales) == tokens:
            return scales
    raise FarError(
        f"{contents.path}: {tokens} tokens in {count} scales are neither the 256 nor the 512 px model's; give the "
        "sides of the token maps: --config patch_nums=[1,2,4,...]"
    )


def _check_scales(contents: Contents, scales: tuple[int, ...], count: int, tokens: int, first: int) -> None:
    squares = [side * side for side in scales]
    if (len(squares), sum(squares), squares[0]) != (count, tokens, first):
        raise FarError(
            f"{contents.path}: patch_nums {list(scales)} are {len(squares)} scales of {sum(squares)} tokens, "
            f"{squares[0]} in the first; the tensors have {count} scales, {tokens} tokens, {first} in the first: give "
            "them with --config patch_nums=[...]"
        )
    if list(scales) != sorted(set(scales)):
        raise FarError(
            f"{contents.path}: patch_nums {list(scales)} do not rise; give them with --config patch_nums=[...]"
        )


def vqvae_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> VQVAEConfig:
    """Sizes of a VQ-VAE checkpoint; FarError where the tensors are not a VQ-VAE's.

    They do not state the scales: those are VAR's, or the metadata's, or the official 256 px model's.
    """
    levels = count_of(contents, "encoder.down.")
    convolutions = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(levels, 1))]
    shapes = shapes_of(contents, VQVAE_RANKS | dict.fromkeys(convolutions, 4), VQVAE, VQVAEConfig())
    ch, folded = shapes["encoder.conv_in.weight"][:2]
    patch = math.isqrt(folded // 3)
    if folded != 3 * patch * patch:
        raise FarError(f"{contents.path}: encoder.conv_in.weight takes {folded} channels; expected 3 x patch^2")
    for name in convolutions:
        if shapes[name][0] % ch:
            raise FarError(f"{contents.path}: {name} is {list(shapes[name])}; expected a multiple of {ch} channels")
    phis = count_of(contents, "quantize.quant_resi.qresi_ls.")
    if not phis:
        raise FarError(
            f"{contents.path}: no quantize.quant_resi.qresi_ls.*; expected convolutions that the scales share, as in "
            "vae_ch160v4096z32.pth"
        )
    sizes: dict[str, Any] = {
        "ch": ch,
        "multipliers": tuple(shapes[name][0] // ch for name in convolutions),
        "blocks": count_of(contents, "encoder.down.0.block."),
        "patch": patch,
        "channels": shapes["quantize.embedding.weight"][1],
        "vocabulary": shapes["quantize.embedding.weight"][0],
        "phis": phis,
    }
    config = replace(VQVAEConfig(), **{**stated_settings(contents, VQVAEConfig, overrides or {}, sizes), **sizes})
    if list(config.patch_nums) != sorted(set(config.patch_nums)):
        raise FarError(
            f"{contents.path}: patch_nums {list(config.patch_nums)} do not rise; give --config patch_nums=[...]"
        )
    return config
