"""VAR's stages: condition (once a picture), transformer (with its keys and values), logits and quantize. The choice of
tokens is in var_token_choice, the stages for editing in var_editing."""

from __future__ import annotations

import inspect
from dataclasses import asdict

import torch
from torch import Tensor, nn

from far_export.stages.flops import count_flops
from far_export.stages.rows import gather_rows
from far_export.stages.stage import BATCH, ROWS, Input, Stage
from far_export.stages.vae import decode_stage
from far_export.stages.var_token_choice import choose_stage, smooth_stage
from far_models.islands import island
from far_models.var import VAR, VARConfig
from far_models.vq_vae import VQVAE
from far_runtime.bundle import TensorSpec
from far_runtime.errors import FarError, SettingName
from far_runtime.model_info import VarInfo
from far_runtime.sampling.var import cache_names


class ConditionStageModule(nn.Module):
    """labels [rows] -> all that depends on the class alone: the first scale's input [rows, T, W], the modulation of all
    blocks [rows, depth, 6, W] and of the head [rows, 2, W]."""

    def __init__(self, var: VAR) -> None:
        super().__init__()
        self.var = var

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        condition = gather_rows(self.var.class_emb.weight, labels)
        return self.var.first_input(condition), *self.var.modulations(condition)


class TransformerStageModule(nn.Module):
    """x [rows, T, W], modulation [rows, depth, 6, W] and every block's keys and values of the coarser scales
    [rows, heads, past, d] -> hidden [rows, T, W], and the keys and values with those of this scale appended."""

    def __init__(self, var: VAR) -> None:
        super().__init__()
        self.blocks = var.blocks
        self.caches = cache_names(var.config.depth)
        names = ["x", "modulation", *(name for pair in self.caches for name in pair)]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]

        def forward(**inputs: Tensor) -> tuple[Tensor, ...]:
            return self.compute(inputs)

        # torch.export reads the names of the inputs from the signature, and their number depends on the depth.
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def compute(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs in the order in which the stage names them."""
        dtype = self.blocks[0].attn.proj.weight.dtype
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        x, modulation = inputs["x"], inputs["modulation"]
        next_caches: list[Tensor] = []
        for i, (block, (key, value)) in enumerate(zip(self.blocks, self.caches, strict=True)):
            x, cache = block(x, modulation[:, i], (inputs[key], inputs[value]))
            next_caches += cache
        return x, *next_caches


class LogitsStageModule(nn.Module):
    """hidden [rows, T, W] and the head's modulation [rows, 2, W] -> guided logits [B, T, V]: uncond + guidance (cond -
    uncond).

    picked: [n], the rows that the head computes: n = B without guidance (at the first scale), 2 B with it.
    pictures: [B], 0 .. B - 1. guidance: [B], a scale per picture.
    """

    def __init__(self, var: VAR) -> None:
        super().__init__()
        self.head_nm = var.head_nm
        self.head = var.head

    def forward(
        self, hidden: Tensor, head_modulation: Tensor, picked: Tensor, pictures: Tensor, guidance: Tensor
    ) -> Tensor:
        dtype = self.head.weight.dtype
        hidden, head_modulation = gather_rows(hidden, picked).to(dtype), gather_rows(head_modulation, picked).to(dtype)
        logits = self.head(self.head_nm(hidden, head_modulation)).float()
        island("guidance")
        conditional = gather_rows(logits, pictures)
        unconditional = gather_rows(logits, pictures + (picked.shape[0] - pictures.shape[0]))
        out: Tensor = unconditional + guidance[:, None, None] * (conditional - unconditional)
        return out


class QuantizeStageModule(nn.Module):
    """embeddings of a scale's tokens [B, T, C], latents [B, L, C] (the feature map f_hat so far) -> the feature map
    with this scale [B, L, C] and the next scale's input [rows, N, W].

    here, after: [T] and [N], the numbers of this and of the next scale's tokens among those of all scales; N = 0 after
    the last scale. phi: [1], the number of the convolution. pictures: [rows], the picture of each row of x.
    """

    positions: Tensor

    def __init__(self, var: VAR, vqvae: VQVAE) -> None:
        super().__init__()
        self.quantize = vqvae.quantize
        self.word_embed = var.word_embed
        self.register_buffer("positions", var.positions().detach())

    def forward(
        self, embeddings: Tensor, latents: Tensor, here: Tensor, after: Tensor, phi: Tensor, pictures: Tensor
    ) -> tuple[Tensor, Tensor]:
        cells = gather_rows(self.quantize.up, here).transpose(0, 1) @ embeddings
        refined = [self.quantize.apply_phi(cells, convolution) for convolution in self.quantize.quant_resi.qresi_ls]
        latents = latents + gather_rows(torch.stack(refined), phi).squeeze(0)
        next_scale = (gather_rows(self.quantize.down, after) @ latents).to(self.positions.dtype)
        x = self.word_embed(next_scale) + gather_rows(self.positions, after)
        return latents, gather_rows(x, pictures)


def stages(var: VAR, vqvae: VQVAE, pixels: bool = True) -> list[Stage]:
    """The stages that a picture is drawn with; FarError where the VQ-VAE is not the model's.

    With pixels=False, decode gives the float image in about [-1, 1].
    """
    vqvae = matching_vqvae(var, vqvae)
    config = var.config
    return [
        condition_stage(var),
        transformer_stage(var),
        logits_stage(var),
        choose_stage(vqvae.quantize.embedding.weight, token_sizes(config)),
        smooth_stage(vqvae.quantize.embedding.weight, token_sizes(config)),
        quantize_stage(var, vqvae),
        decode_stage(vqvae, config.patch_nums[-1], 1.0, pixels),
    ]


def var_info(var: VAR, vqvae: VQVAE) -> VarInfo:
    """What the manifest says of the model: all that the loop needs to know."""
    config, of_vae = var.config, matching_vqvae(var, vqvae).config
    grid = config.patch_nums[-1]
    record = {"grid": grid, "phis": of_vae.phis, "condition": "labels", "image_size": grid * of_vae.stride}
    return VarInfo.read({**asdict(config), **record, "vae": asdict(of_vae)}, "the checkpoint")


def matching_vqvae(var: VAR, vqvae: VQVAE) -> VQVAE:
    """The VQ-VAE with the model's scales; FarError where its codes are not those that the model was trained on."""
    config, vae = var.config, vqvae.config
    if (config.channels, config.vocabulary) != (vae.channels, vae.vocabulary):
        raise FarError(
            f"the model was trained on {config.vocabulary} codes of {config.channels} channels, the VQ-VAE has "
            f"{vae.vocabulary} of {vae.channels}; give the model's own with ",
            SettingName("vae"),
        )
    return vqvae.with_scales(config.patch_nums)


def token_sizes(config: VARConfig) -> tuple[int, int, int]:
    """Smallest, usual and largest number of a scale's tokens."""
    largest = config.patch_nums[-1] ** 2
    return (1, largest, largest)


def condition_stage(var: VAR) -> Stage:
    """Class labels into the first scale's input and all modulations, once per picture."""
    config = var.config
    module = ConditionStageModule(var).eval()
    width = config.width
    return Stage(
        stage="condition",
        module=module,
        inputs=(Input("labels", ("rows",), "int64", config.classes + 1),),
        outputs=(
            TensorSpec("x", "float32", ("rows", config.first_tokens, width)),
            TensorSpec("modulation", "float32", ("rows", config.depth, 6, width)),
            TensorSpec("head_modulation", "float32", ("rows", 2, width)),
        ),
        profile={"rows": ROWS},
        flops={"": count_flops(module, (torch.empty(1, dtype=torch.int64, device="meta"),))},
    )


def transformer_stage(var: VAR) -> Stage:
    """All blocks over one scale's tokens, with the keys and values of the coarser scales (none at the first)."""
    config = var.config
    names = [name for pair in cache_names(config.depth) for name in pair]
    head = config.width // config.heads
    sizes = token_sizes(config)
    past = config.tokens - sizes[2]
    # The exporter traces one more; two axes of one length would be taken for the same.
    usual = past - 1 if past + 1 in (6, sizes[1] + 1) else past
    tokens = ("rows", "tokens", config.width)
    return Stage(
        stage="transformer",
        module=TransformerStageModule(var).eval(),
        inputs=(
            Input("x", tokens),
            Input("modulation", ("rows", config.depth, 6, config.width)),
            *(Input(name, ("rows", config.heads, "past", head)) for name in names),
        ),
        outputs=(
            TensorSpec("hidden", "float32", tokens),
            *(TensorSpec(f"next_{name}", "float32", ("rows", config.heads, "all", head)) for name in names),
        ),
        profile={"rows": ROWS, "tokens": sizes, "past": (0, usual, past)},
        fp32_islands=("layer_norm", "softmax", *(("normalize", "scale_mul_1H11") if config.attn_l2_norm else ())),
        flops=transformer_flops(config),
    )


def transformer_flops(config: VARConfig) -> dict[str, float]:
    """FLOPs of a row: the matrix products of every token, and attention to all tokens so far."""
    width, hidden = config.width, round(config.width * config.mlp_ratio)
    attention = 4.0 * width * config.depth
    return {
        "tokens": 2.0 * config.depth * width * (4 * width + 2 * hidden),
        "tokens past": attention,
        "tokens tokens": attention,
    }


def logits_stage(var: VAR) -> Stage:
    """The head, with guidance."""
    config = var.config
    return Stage(
        stage="logits",
        module=LogitsStageModule(var).eval(),
        inputs=(
            Input("hidden", ("rows", "tokens", config.width)),
            Input("head_modulation", ("rows", 2, config.width)),
            Input("picked", ("picked",), "int64", "rows"),
            Input("pictures", ("batch",), "int64", "batch"),
            Input("guidance", ("batch",)),
        ),
        outputs=(TensorSpec("logits", "float32", ("batch", "tokens", config.vocabulary)),),
        profile={"batch": BATCH, "rows": ROWS, "picked": ROWS, "tokens": token_sizes(config)},
        fp32_islands=("layer_norm", "guidance"),
        flops={"tokens": 2.0 * config.width * config.vocabulary},
    )


def quantize_stage(var: VAR, vqvae: VQVAE) -> Stage:
    """The feature map with one more scale, and the next scale's input, for any scale."""
    config = var.config
    cells, channels, width = config.patch_nums[-1] ** 2, config.channels, config.width
    sizes = token_sizes(config)
    coarser = [side * side for side in config.patch_nums[:-1]] or [1]
    return Stage(
        stage="quantize",
        module=QuantizeStageModule(var, vqvae).eval(),
        inputs=(
            Input("embeddings", ("batch", "tokens", channels)),
            Input("latents", ("batch", cells, channels)),
            Input("here", ("tokens",), "int64", config.tokens),
            Input("after", ("after",), "int64", config.tokens),
            Input("phi", (1,), "int64", vqvae.config.phis),
            Input("pictures", ("rows",), "int64", "batch"),
        ),
        outputs=(
            TensorSpec("next_latents", "float32", ("batch", cells, channels)),
            TensorSpec("x", "float32", ("rows", "after", width)),
        ),
        profile={"batch": BATCH, "rows": ROWS, "tokens": (1, coarser[-1], sizes[2]), "after": (0, sizes[1], sizes[2])},
        fp32_islands=("quantize",),
        flops={
            "": 18.0 * vqvae.config.phis * cells * channels**2,
            "tokens": 2.0 * cells * channels,
            "after": 2.0 * cells * channels + 2.0 * channels * width,
        },
    )
