"""MAR's stages: a transformer without levels, which computes the condition of one iteration's tokens; denoise and place
are FAR's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from far_export.stages.far import denoise_stage, place_stage
from far_export.stages.flops import features_flops, flops_by_visible_tokens
from far_export.stages.rows import gather_rows, repeat_for_guidance
from far_export.stages.stage import BATCH, ROWS, Input, Stage
from far_models.far import FARConfig
from far_models.mar import MAR
from far_runtime.bundle import TensorSpec


class TransformerStageModule(nn.Module):
    """latents [B, L, C] drawn so far, labels [g B], visible [B, V], restore [B, L], predicted [B, T] -> head condition
    [g B, T, head width] of the predicted tokens.

    visible, predicted: numbers of these tokens. restore: for every position its place among the visible tokens, V for
    the mask token.
    """

    class_table: Tensor

    def __init__(self, mar: MAR) -> None:
        super().__init__()
        self.mar = mar
        self.register_buffer("class_table", torch.cat([mar.class_emb.weight, mar.fake_latent]))

    def forward(self, latents: Tensor, labels: Tensor, visible: Tensor, restore: Tensor, predicted: Tensor) -> Tensor:
        rows = labels.shape[0]
        x, visible, restore, predicted = (
            repeat_for_guidance(tensor, rows) for tensor in (latents, visible, restore, predicted)
        )
        classes = gather_rows(self.class_table, labels)
        z = self.mar.features(x.to(self.class_table.dtype), classes, visible, restore, predicted)
        return self.mar.diffloss.net.condition(z)


def transformer_stage(mar: MAR) -> Stage:
    """The transformer, for any number of visible and of predicted tokens."""
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
            "batch": BATCH,
            "rows": ROWS,
            "count": (0, tokens // 2, tokens - 1),
            "tokens": (1, 8, tokens),
        },
        fp32_islands=("norm", "z_proj_ln", "softmax"),
        flops=_flops(config),
    )


def _flops(config: FARConfig) -> dict[str, float]:
    with torch.device("meta"):
        mar = MAR(config)
    terms = flops_by_visible_tokens(lambda count: features_flops(mar, count), config.tokens)
    # The last block's queries, and what follows them up to the projection of z, are computed for predicted tokens only.
    width, all_tokens = config.decoder_width, config.tokens + config.buffer
    block = 4.0 * width * all_tokens + 2.0 * width**2 * (1 + 2 * config.mlp_ratio)
    projection = 2.0 * width * config.head_width
    constant = terms[""] - block * all_tokens - projection * config.tokens
    return {**terms, "": constant, "tokens": block + projection}


def stages(mar: MAR) -> list[Stage]:
    """The stages that a picture is drawn with: transformer, denoise and place."""
    return [transformer_stage(mar), denoise_stage(mar, "tokens"), place_stage(mar.config)]
