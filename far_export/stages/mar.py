"""MAR's stages: FAR's, but for a transformer that knows no level and conditions the tokens of one iteration only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from far_export.stages.far import denoise_stage, features_flops, in_visible_tokens, pick, place_stage, spread
from far_export.stages.stage import Input, Stage
from far_models.far import FARConfig
from far_models.mar import MAR
from far_runtime.bundle import TensorSpec


class TransformerStageModule(nn.Module):
    """latents [B, L, C] known so far, labels [g B], visible [B, V], restore [B, L], predicted [B, T] -> head condition
    [g B, T, head width] of the predicted tokens."""

    class_table: Tensor

    def __init__(self, mar: MAR) -> None:
        super().__init__()
        self.mar = mar
        self.register_buffer("class_table", torch.cat([mar.class_emb.weight, mar.fake_latent]))

    def forward(self, latents: Tensor, labels: Tensor, visible: Tensor, restore: Tensor, predicted: Tensor) -> Tensor:
        rows = labels.shape[0]
        x, visible, restore, predicted = (spread(tensor, rows) for tensor in (latents, visible, restore, predicted))
        classes = pick(self.class_table, labels)
        z = self.mar.features(x.to(self.class_table.dtype), classes, visible, restore, predicted)
        return self.mar.diffloss.net.condition(z)


def transformer_stage(mar: MAR) -> Stage:
    """The transformer over any number of visible tokens, for any number of predicted ones."""
    config, tokens = mar.config, mar.config.tokens
    return Stage(
        stage="transformer",
        module=TransformerStageModule(mar).eval(),
        inputs=(
            Input("latents", ("batch", tokens, config.channels)),
            Input("labels", ("rows",), "int64", config.classes + 1),
            Input("visible", ("batch", "count"), "int64", tokens),
            Input("restore", ("batch", tokens), "int64", "count"),
            Input("predicted", ("batch", "tokens"), "int64", tokens),
        ),
        outputs=(TensorSpec("condition", "float32", ("rows", "tokens", config.head_width)),),
        profile={
            "batch": (1, 4, 64),
            "rows": (1, 8, 128),
            "count": (0, tokens // 2, tokens - 1),
            "tokens": (1, 8, tokens),
        },
        fp32_islands=("norm", "z_proj_ln", "softmax"),
        flops=_flops(config),
    )


def _flops(config: FARConfig) -> dict[str, float]:
    with torch.device("meta"):
        mar = MAR(config)
    terms = in_visible_tokens(lambda count: features_flops(mar, count), config.tokens)
    # Of the predicted tokens only: the last block's queries, and what follows them up to the projection of z.
    width, every = config.decoder_width, config.tokens + config.buffer
    block = 4.0 * width * every + 2.0 * width**2 * (1 + 2 * config.mlp_ratio)
    projection = 2.0 * width * config.head_width
    rest = terms[""] - block * every - projection * config.tokens
    return {**terms, "": rest, "tokens": block + projection}


def stages(mar: MAR) -> list[Stage]:
    """Transformer, denoise and place stages of a MAR model."""
    return [transformer_stage(mar), denoise_stage(mar, "tokens"), place_stage(mar.config)]
