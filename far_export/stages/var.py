"""VAR's stages as torch modules: condition (once a picture), transformer (with its keys and values), logits, quantize,
and for editing encode, tokenize and place. The choice of tokens is in var_choice."""

from __future__ import annotations

import inspect
from dataclasses import asdict

import torch
from torch import Tensor, nn

from far_export.stages.far import PlaceStageModule, pick
from far_export.stages.flops import count_flops
from far_export.stages.stage import Input, Stage
from far_export.stages.vae import decode_stage
from far_export.stages.var_token_choice import choose_stage, smooth_stage
from far_models.islands import island
from far_models.var import VAR, VARConfig
from far_models.vq_vae import VQVAE
from far_runtime.bundle import TensorSpec
from far_runtime.errors import FarError
from far_runtime.model_info import VarInfo
from far_runtime.sampling.var import cache_names

BATCH, ROWS = (1, 4, 64), (1, 8, 128)


class ConditionStageModule(nn.Module):
    """labels [rows] -> the first scale's input [rows, T, W], the modulation of all blocks [rows, depth, 6, W] and of
    the head [rows, 2, W]: all that depends on the class alone, once a picture."""

    def __init__(self, var: VAR) -> None:
        super().__init__()
        self.var = var

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        condition = pick(self.var.class_emb.weight, labels)
        return self.var.first_input(condition), *self.var.modulations(condition)


class TransformerStageModule(nn.Module):
    """x [rows, T, W], modulation [rows, depth, 6, W] and every block's keys and values so far [rows, heads, past, d]
    -> hidden [rows, T, W] and the keys and values with this scale's behind them."""

    def __init__(self, var: VAR) -> None:
        super().__init__()
        self.blocks = var.blocks
        self.caches = cache_names(var.config.depth)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = ["x", "modulation", *(name for pair in self.caches for name in pair)]

        def forward(**inputs: Tensor) -> tuple[Tensor, ...]:
            return self.compute(inputs)

        # torch.export reads the names of the inputs from the signature, and their number depends on the depth.
        forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kind) for name in names]
        )
        self.forward = forward

    def compute(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs in the order in which the stage names them."""
        dtype = self.blocks[0].attn.proj.weight.dtype
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        x, modulation = inputs["x"], inputs["modulation"]
        grown: list[Tensor] = []
        for i, (block, (key, value)) in enumerate(zip(self.blocks, self.caches, strict=True)):
            x, cache = block(x, modulation[:, i], (inputs[key], inputs[value]))
            grown += cache
        return x, *grown


class LogitsStageModule(nn.Module):
    """hidden [rows, T, W] and the head's modulation [rows, 2, W] -> guided logits [B, T, V].

    picked [n]: the rows that the head looks at, n = B where there is no guidance (the first scale) and 2 B with it.
    pictures [B]: 0 .. B - 1. Guided by a scale a picture [B]: uncond + guidance (cond - uncond).
    """

    def __init__(self, var: VAR) -> None:
        super().__init__()
        self.head_nm = var.head_nm
        self.head = var.head

    def forward(
        self, hidden: Tensor, head_modulation: Tensor, picked: Tensor, pictures: Tensor, guidance: Tensor
    ) -> Tensor:
        dtype = self.head.weight.dtype
        hidden, head_modulation = pick(hidden, picked).to(dtype), pick(head_modulation, picked).to(dtype)
        logits = self.head(self.head_nm(hidden, head_modulation)).float()
        island("guidance")
        conditional = pick(logits, pictures)
        unconditional = pick(logits, pictures + (picked.shape[0] - pictures.shape[0]))
        out: Tensor = unconditional + guidance[:, None, None] * (conditional - unconditional)
        return out


class QuantizeStageModule(nn.Module):
    """What a scale's embeddings [B, T, C] add to the feature map [B, L, C], and the next scale's input [rows, N, W].

    here [T], after [N]: numbers of this scale's and the next one's tokens among all scales' (N = 0 after the last).
    phi [1]: the convolution. pictures [rows]: the picture that each row of the next input belongs to.
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
        cells = pick(self.quantize.up, here).transpose(0, 1) @ embeddings
        refined = [self.quantize.refined(cells, one) for one in self.quantize.quant_resi.qresi_ls]
        latents = latents + pick(torch.stack(refined), phi).squeeze(0)
        following = (pick(self.quantize.down, after) @ latents).to(self.positions.dtype)
        x = self.word_embed(following) + pick(self.positions, after)
        return latents, pick(x, pictures)


class EncodeStageModule(nn.Module):
    """Pixels uint8 [B, H, W, 3] -> the encoder's features [B, L, C], not yet quantised."""

    def __init__(self, vqvae: VQVAE) -> None:
        super().__init__()
        self.vqvae = vqvae

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1
        return self.vqvae.encode(images.to(self.vqvae.quant_conv.weight.dtype)).flatten(2).transpose(1, 2)


class TokenizeStageModule(nn.Module):
    """The encoder's features [B, L, C] -> the embeddings [B, T, C] of the tokens of all scales."""

    def __init__(self, vqvae: VQVAE) -> None:
        super().__init__()
        self.quantize = vqvae.quantize

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.quantize.embedding(self.quantize.encode(latents))
        return out


def stages(var: VAR, vqvae: VQVAE, pixels: bool = True) -> list[Stage]:
    """All stages that a picture is drawn with; FarError where the VQ-VAE is not the model's.

    pixels=False: decode gives the float image in about [-1, 1].
    """
    vqvae = _fitting(var, vqvae)
    config = var.config
    return [
        condition_stage(var),
        transformer_stage(var),
        logits_stage(var),
        choose_stage(vqvae.quantize.embedding.weight, _tokens(config)),
        smooth_stage(vqvae.quantize.embedding.weight, _tokens(config)),
        quantize_stage(var, vqvae),
        decode_stage(vqvae, config.patch_nums[-1], 1.0, pixels),
    ]


def editing_stages(var: VAR, vqvae: VQVAE) -> list[Stage]:
    """The stages that an edit needs beside."""
    vqvae = _fitting(var, vqvae)
    return [encode_stage(vqvae), tokenize_stage(vqvae), place_stage(var.config)]


def var_info(var: VAR, vqvae: VQVAE) -> VarInfo:
    """What the manifest says of the model: all that the loop needs to know."""
    config, of_vae = var.config, _fitting(var, vqvae).config
    grid = config.patch_nums[-1]
    record = {"grid": grid, "phis": of_vae.phis, "condition": "labels", "image_size": grid * of_vae.stride}
    return VarInfo.read({**asdict(config), **record, "vae": asdict(of_vae)}, "the checkpoint")


def _fitting(var: VAR, vqvae: VQVAE) -> VQVAE:
    """The VQ-VAE over the model's scales."""
    ours, theirs = var.config, vqvae.config
    if (ours.channels, ours.vocabulary) != (theirs.channels, theirs.vocabulary):
        raise FarError(
            f"the model was trained on {ours.vocabulary} codes of {ours.channels} channels, the VQ-VAE has "
            f"{theirs.vocabulary} of {theirs.channels}; give the model's own with --vae"
        )
    return vqvae.with_scales(ours.patch_nums)


def _tokens(config: VARConfig) -> tuple[int, int, int]:
    """Tokens of a scale."""
    largest = config.patch_nums[-1] ** 2
    return (1, largest, largest)


def condition_stage(var: VAR) -> Stage:
    """Class labels into the first input and all modulations."""
    config = var.config
    module = ConditionStageModule(var).eval()
    width = config.width
    return Stage(
        stage="condition",
        module=module,
        inputs=(Input("labels", ("rows",), "int64", config.classes + 1),),
        outputs=(
            TensorSpec("x", "float32", ("rows", config.first, width)),
            TensorSpec("modulation", "float32", ("rows", config.depth, 6, width)),
            TensorSpec("head_modulation", "float32", ("rows", 2, width)),
        ),
        profile={"rows": ROWS},
        flops={"": count_flops(module, (torch.empty(1, dtype=torch.int64, device="meta"),))},
    )


def transformer_stage(var: VAR) -> Stage:
    """All blocks over one scale's tokens, with the keys and values of the coarser ones (none at the first)."""
    config = var.config
    names = [name for pair in cache_names(config.depth) for name in pair]
    head = config.width // config.heads
    sizes = _tokens(config)
    past = config.tokens - sizes[2]
    # Traced one larger: two axes of one size would be taken for the same.
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
    """Arithmetic of a row: the matrices for every token, and attention to all tokens so far."""
    width, hidden = config.width, round(config.width * config.mlp_ratio)
    attention = 4.0 * width * config.depth
    return {
        "tokens": 2.0 * config.depth * width * (4 * width + 2 * hidden),
        "tokens past": attention,
        "tokens tokens": attention,
    }


def logits_stage(var: VAR) -> Stage:
    """The head with guidance."""
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
        profile={"batch": BATCH, "rows": ROWS, "picked": ROWS, "tokens": _tokens(config)},
        fp32_islands=("layer_norm", "guidance"),
        flops={"tokens": 2.0 * config.width * config.vocabulary},
    )


def quantize_stage(var: VAR, vqvae: VQVAE) -> Stage:
    """The feature map so far and the next scale's input, for any scale."""
    config = var.config
    cells, channels, width = config.patch_nums[-1] ** 2, config.channels, config.width
    sizes = _tokens(config)
    before = [side * side for side in config.patch_nums[:-1]] or [1]
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
        profile={"batch": BATCH, "rows": ROWS, "tokens": (1, before[-1], sizes[2]), "after": (0, sizes[1], sizes[2])},
        fp32_islands=("quantize",),
        flops={
            "": 18.0 * vqvae.config.phis * cells * channels**2,
            "tokens": 2.0 * cells * channels,
            "after": 2.0 * cells * channels + 2.0 * channels * width,
        },
    )


def encode_stage(vqvae: VQVAE) -> Stage:
    """The VQ-VAE's encoder over pictures of the model's size, for editing."""
    config, grid = vqvae.config, vqvae.quantize.side
    side = grid * config.stride
    module = EncodeStageModule(vqvae).eval()
    return Stage(
        stage="encode",
        module=module,
        inputs=(Input("pixels", ("batch", side, side, 3), "uint8", 256),),
        outputs=(TensorSpec("latents", "float32", ("batch", grid * grid, config.channels)),),
        profile={"batch": BATCH},
        fp32_islands=("norm", "softmax"),
        flops={"": count_flops(module, (torch.empty(1, side, side, 3, dtype=torch.uint8, device="meta"),))},
    )


def tokenize_stage(vqvae: VQVAE) -> Stage:
    """The encoder's features into the embeddings of all scales' tokens, for editing.

    The tolerance is wide since of two codes that are equally near an engine may take the other, and then what the finer
    scales code differs too.
    """
    config, cells = vqvae.config, vqvae.quantize.side**2
    module = TokenizeStageModule(vqvae).eval()
    tokens = sum(side * side for side in config.patch_nums)
    return Stage(
        stage="tokenize",
        module=module,
        inputs=(Input("latents", ("batch", cells, config.channels)),),
        outputs=(TensorSpec("embeddings", "float32", ("batch", tokens, config.channels)),),
        profile={"batch": BATCH},
        tolerance=0.3,
        fp32_islands=("tokenize",),
        flops={"": count_flops(module, (torch.empty(1, cells, config.channels, device="meta"),))},
    )


def place_stage(config: VARConfig) -> Stage:
    """A scale's embeddings put together from the known ones of all scales and the drawn ones."""
    return Stage(
        stage="place",
        module=PlaceStageModule().eval(),
        inputs=(
            Input("latents", ("batch", config.tokens, config.channels)),
            Input("sample", ("batch", "tokens", config.channels)),
            Input("index", ("batch", "tokens"), "int64", config.tokens),
        ),
        outputs=(TensorSpec("latents_out", "float32", ("batch", "tokens", config.channels)),),
        profile={"batch": BATCH, "tokens": _tokens(config)},
        tolerance=1e-6,  # a copy
        fp32_islands=("place",),
    )
