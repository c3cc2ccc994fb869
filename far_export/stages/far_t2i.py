"""FAR-T2I's stages: context (the prompt's features as the blocks take them) and transformer; denoise and place are
FAR's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from far_export.stages.far import apply_lowpass, denoise_stage
from far_export.stages.flops import count_flops, flops_by_visible_tokens
from far_export.stages.rows import gather_rows, repeat_for_guidance
from far_export.stages.stage import BATCH, ROWS, Input, Stage
from far_models.far_t2i import FART2I, FART2IConfig
from far_runtime.bundle import TensorSpec
from far_runtime.sampling.base import Step
from far_runtime.sampling.lowpass import lowpass_matrices


class ContextStageModule(nn.Module):
    """features [texts, T, W], index [rows], null [rows] -> context [rows, T, width].

    Each row gets the text of number `index`, embedded, or the learned null condition where `null` is 1.
    """

    def __init__(self, model: FART2I) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, index: Tensor, null: Tensor) -> Tensor:
        return self.model.context(gather_rows(features, index).to(self.model.fake_latent.dtype), null)


class TransformerStageModule(nn.Module):
    """latents [B, L, C] (the previous sample, unfiltered), context [g B, T, width] -> head condition [g B, L, head
    width].

    FAR's transformer stage with the context in the labels' place. Without `latents` no token is visible: the decoder
    runs on mask tokens alone. With a `step`, its level, filter and token count are folded in.
    """

    lowpass: Tensor

    def __init__(self, model: FART2I, step: Step | None = None) -> None:
        super().__init__()
        self.model = model
        self.step = step
        matrices = torch.from_numpy(lowpass_matrices(model.config.grid).copy())
        self.register_buffer("lowpass", matrices if step is None else matrices[step.constants["lowpass"]])

    def forward(
        self,
        context: Tensor,
        latents: Tensor | None = None,
        level: Tensor | None = None,
        lowpass: Tensor | None = None,
        visible: Tensor | None = None,
        restore: Tensor | None = None,
    ) -> Tensor:
        rows, x, dtype = context.shape[0], None, self.model.mask_token.dtype
        if latents is not None and visible is not None and restore is not None:
            matrix = self.lowpass if lowpass is None else gather_rows(self.lowpass, lowpass).squeeze(0)
            x = repeat_for_guidance(apply_lowpass(latents, matrix), rows).to(dtype)
            visible, restore = repeat_for_guidance(visible, rows), repeat_for_guidance(restore, rows)
        z = self.model.features(x, context.to(dtype), visible, restore)
        number = level if self.step is None else context.new_full((1,), self.step.constants["level"])
        return self.model.diffloss.net.condition(z, number)


def context_stage(model: FART2I) -> Stage:
    """Text features into the transformer's context, once per picture."""
    config = model.config
    row = (torch.empty(1, config.context_tokens, config.context_width, device="meta"),)
    return Stage(
        stage="context",
        module=ContextStageModule(model).eval(),
        inputs=(
            Input("features", ("texts", config.context_tokens, config.context_width)),
            Input("index", ("rows",), "int64", "texts"),
            Input("null", ("rows",), "int64", 2),
        ),
        outputs=(TensorSpec("context", "float32", ("rows", config.context_tokens, config.encoder_width)),),
        profile={"texts": BATCH, "rows": ROWS},
        flops={"": count_flops(model.context_embed, row)},
    )


def transformer_inputs(config: FART2IConfig, step: Step | None, nothing_visible: bool) -> tuple[Input, ...]:
    """Inputs of a transformer graph: without level and lowpass for a folded step, and without the latents and their
    indices where nothing is visible."""
    inputs = [Input("context", ("rows", config.context_tokens, config.encoder_width))]
    if step is None:
        inputs.append(Input("level", (1,), "int64", config.grid))
    if nothing_visible:
        return tuple(inputs)
    if step is None:
        inputs.append(Input("lowpass", (1,), "int64", config.grid + 1))
    count: int | str = "count" if step is None else step.constants["count"]
    return (
        *inputs,
        Input("latents", ("batch", config.tokens, config.channels)),
        Input("visible", ("batch", count), "int64", config.tokens),
        Input("restore", ("batch", config.tokens), "int64", count),
    )


def transformer_stage(model: FART2I, step: Step | None = None, nothing_visible: bool = False) -> Stage:
    """The transformer for any level, or with the constants of one step folded in.

    nothing_visible: for the step at which no token is visible, whatever its level. The encoder has nothing to read
    there, and engines do not take arrays of length 0.
    """
    config = model.config
    nothing_visible = nothing_visible or (step is not None and step.constants["count"] == 0)
    inputs = transformer_inputs(config, step, nothing_visible)
    sizes = {"batch": BATCH, "rows": ROWS, "count": (1, config.tokens // 2, config.tokens)}
    constants = {} if step is None else dict(step.constants)
    if nothing_visible:
        # What the previous sample is filtered to does not matter.
        constants = {name: value for name, value in constants.items() if name == "level"} | {"count": 0}
    return Stage(
        stage="transformer",
        module=TransformerStageModule(model, step).eval(),
        inputs=inputs,
        outputs=(TensorSpec("condition", "float32", ("rows", config.tokens, config.head_width)),),
        profile={axis: sizes[axis] for spec in inputs for axis in spec.shape if isinstance(axis, str)},
        fp32_islands=("norm", "z_proj_ln", "softmax", "lowpass"),
        constants=constants,
        flops={"": _row_flops(config, 0)} if nothing_visible else _flops(config),
        suffix=f"_{step.index:02d}_level{step.number:02d}" if step is not None else "_first" if nothing_visible else "",
    )


def stages(model: FART2I, steps: Iterable[Step] | None = None) -> list[Stage]:
    """The stages that a picture is drawn with: context, transformer and denoise.

    The transformer has one graph for the first step and one for all others, or one for each of `steps`.
    """
    if steps is None:
        transformers = [transformer_stage(model, nothing_visible=True), transformer_stage(model)]
    else:
        transformers = [transformer_stage(model, step) for step in steps]
    return [context_stage(model), *transformers, denoise_stage(model, model.config.tokens)]


def _flops(config: FART2IConfig) -> dict[str, float]:
    """FLOPs of a row by the visible tokens."""
    return flops_by_visible_tokens(lambda count: _row_flops(config, count), config.tokens)


def _row_flops(config: FART2IConfig, visible: int) -> float:
    """FLOPs of a row of encoder, decoder and the projection of z."""
    with torch.device("meta"):
        model = FART2I(config)
        context = torch.empty(1, config.context_tokens, config.encoder_width)
        latents = torch.empty(1, config.tokens, config.channels)
        indices = [torch.empty(1, n, dtype=torch.int64) for n in (visible, config.tokens)]
    inputs = (latents, context, *indices) if visible else (None, context)
    return count_flops(model.features, inputs) + 2.0 * config.tokens * config.decoder_width * config.head_width
