"""The configurations of VAR and its VQ-VAE from their checkpoints, whose tensors state nearly everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from far_models.checkpoint.file import Contents
from far_models.checkpoint.settings import (
    autoencoder_ranks,
    autoencoder_sizes,
    count_modules,
    read_shapes,
    stated_settings,
)
from far_models.var import VAR, VARConfig
from far_models.vq_vae import VQVAE, VQVAEConfig
from far_runtime.errors import FarError
from far_runtime.sampling.pyramid import SCALES_256, SCALES_512

BUFFERS = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")
"""Buffers that the official modules save beside their parameters."""
HEAD_WIDTH = 64
"""Width of an attention head where the tensors do not state the number of heads."""
VAR_RANKS = {
    "pos_start": 3,
    "pos_1LC": 3,
    "word_embed.weight": 2,
    "class_emb.weight": 2,
    "lvl_embed.weight": 2,
    "head.weight": 2,
    "blocks.0.ffn.fc1.weight": 2,
}
"""The tensors that state the sizes of a VAR, and their numbers of dimensions."""


def parameters_of(contents: Contents) -> dict[str, Tensor]:
    """The file's tensors without the official modules' buffers."""
    return {name: t for name, t in contents.tensors.items() if name.rpartition(".")[2] not in BUFFERS}


def var_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> VARConfig:
    """Sizes of a VAR checkpoint.

    680 or 2240 positions in ten scales are the official models'; other scales have to be given. Raises FarError where
    the tensors are not VAR's, a setting is not allowed, or nothing states the scales or the number of heads.
    """
    shapes = read_shapes(contents, VAR_RANKS, VAR, VARConfig())
    width, channels = shapes["word_embed.weight"]
    scale = contents.tensors.get("blocks.0.attn.scale_mul_1H11")
    sizes: dict[str, Any] = {
        "channels": channels,
        "vocabulary": shapes["head.weight"][0],
        "classes": shapes["class_emb.weight"][0] - 1,
        "width": width,
        "depth": count_modules(contents, "blocks."),
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
    _check_rising(contents, scales)


def vqvae_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> VQVAEConfig:
    """Sizes of a VQ-VAE checkpoint; FarError where the tensors are not a VQ-VAE's.

    The tensors do not state the scales; they are VAR's, or the metadata's, or those of the official 256 px model.
    """
    ranks = {**autoencoder_ranks(contents), "quantize.embedding.weight": 2, "post_quant_conv.weight": 4}
    shapes = read_shapes(contents, ranks, VQVAE, VQVAEConfig())
    phis = count_modules(contents, "quantize.quant_resi.qresi_ls.")
    sizes = {
        **autoencoder_sizes(contents, shapes),
        "channels": shapes["quantize.embedding.weight"][1],
        "vocabulary": shapes["quantize.embedding.weight"][0],
        "phis": phis,
    }
    if not phis:
        raise FarError(
            f"{contents.path}: no quantize.quant_resi.qresi_ls.*; expected convolutions that the scales share, as in "
            "vae_ch160v4096z32.pth"
        )
    config = replace(VQVAEConfig(), **{**stated_settings(contents, VQVAEConfig, overrides or {}, sizes), **sizes})
    _check_rising(contents, config.patch_nums)
    return config


def _check_rising(contents: Contents, scales: tuple[int, ...]) -> None:
    if list(scales) != sorted(set(scales)):
        raise FarError(
            f"{contents.path}: patch_nums {list(scales)} do not rise; give them with --config patch_nums=[...]"
        )
