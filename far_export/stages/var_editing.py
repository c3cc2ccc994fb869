"""VAR's stages for editing: encode (pixels to features), tokenize (features to the tokens of all scales) and place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from far_export.stages.flops import count_flops
from far_export.stages.rows import PlaceStageModule
from far_export.stages.stage import BATCH, Input, Stage
from far_export.stages.var import matching_vqvae, token_sizes
from far_models.var import VAR, VARConfig
from far_models.vq_vae import VQVAE
from far_runtime.bundle import TensorSpec


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


def editing_stages(var: VAR, vqvae: VQVAE) -> list[Stage]:
    """The stages that only an edit needs."""
    vqvae = matching_vqvae(var, vqvae)
    return [encode_stage(vqvae), tokenize_stage(vqvae), place_stage(var.config)]


def encode_stage(vqvae: VQVAE) -> Stage:
    """The VQ-VAE's encoder over pictures of the model's size."""
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
    """The encoder's features into the embeddings of all scales' tokens."""
    config, cells = vqvae.config, vqvae.quantize.side**2
    module = TokenizeStageModule(vqvae).eval()
    tokens = sum(side * side for side in config.patch_nums)
    return Stage(
        stage="tokenize",
        module=module,
        inputs=(Input("latents", ("batch", cells, config.channels)),),
        outputs=(TensorSpec("embeddings", "float32", ("batch", tokens, config.channels)),),
        profile={"batch": BATCH},
        # Of two codes that are equally near an engine may take the other, and then the finer scales differ too.
        tolerance=0.3,
        fp32_islands=("tokenize",),
        flops={"": count_flops(module, (torch.empty(1, cells, config.channels, device="meta"),))},
    )


def place_stage(config: VARConfig) -> Stage:
    """A scale's embeddings, taken from those of the kept tokens of all scales and from the drawn ones."""
    return Stage(
        stage="place",
        module=PlaceStageModule().eval(),
        inputs=(
            Input("latents", ("batch", config.tokens, config.channels)),
            Input("sample", ("batch", "tokens", config.channels)),
            Input("index", ("batch", "tokens"), "int64", config.tokens),
        ),
        outputs=(TensorSpec("latents_out", "float32", ("batch", "tokens", config.channels)),),
        profile={"batch": BATCH, "tokens": token_sizes(config)},
        tolerance=1e-6,  # a copy
        fp32_islands=("place",),
    )
