"""FAR's stages: transformer (with the low-pass filter in front), denoise (with guidance and the solver's update) and
place (tokens by index)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from far_export.stages.flops import count_flops, features_flops, flops_by_visible_tokens
from far_export.stages.rows import PlaceStageModule, gather_rows, repeat_for_guidance
from far_export.stages.stage import BATCH, ROWS, Input, Stage
from far_models.far import FAR, FARConfig
from far_models.far_t2i import FART2IConfig
from far_models.islands import island
from far_runtime.bundle import TensorSpec
from far_runtime.sampling.base import Step
from far_runtime.sampling.lowpass import lowpass_matrices
from far_runtime.sampling.solvers import COEFFICIENTS


def apply_lowpass(latents: Tensor, matrix: Tensor) -> Tensor:
    """matrix [side, side] x latents x matrix^T over the grid of latents [B, side^2, C]; two matrix products."""
    side, channels = matrix.shape[0], latents.shape[-1]
    x = matrix @ latents.reshape(-1, side, side * channels)
    x = matrix @ x.reshape(-1, side, channels)
    return x.reshape(-1, side * side, channels)


class TransformerStageModule(nn.Module):
    """latents [B, L, C] (the previous sample, unfiltered), labels [g B] -> head condition [g B, L, head width], with
    g = 2 under guidance and 1 without.

    Filters the latents to level `lowpass`, runs encoder and decoder, and ends with all of the head that does not
    depend on the diffusion step: the projection of z and the embedding of the level. With a `step`, its level, filter
    and token count are folded in.
    """

    lowpass: Tensor
    class_table: Tensor

    def __init__(self, far: FAR, step: Step | None = None) -> None:
        super().__init__()
        self.far = far
        self.step = step
        matrices = torch.from_numpy(lowpass_matrices(far.config.grid, far.config.filter).copy())
        self.register_buffer("lowpass", matrices if step is None else matrices[step.constants["lowpass"]])
        self.register_buffer("class_table", torch.cat([far.class_emb.weight, far.fake_latent]))

    def forward(
        self,
        labels: Tensor,
        latents: Tensor | None = None,
        level: Tensor | None = None,
        lowpass: Tensor | None = None,
        visible: Tensor | None = None,
        restore: Tensor | None = None,
    ) -> Tensor:
        rows = labels.shape[0]
        x = None
        if latents is not None:
            matrix = self.lowpass if lowpass is None else gather_rows(self.lowpass, lowpass).squeeze(0)
            x = repeat_for_guidance(apply_lowpass(latents, matrix), rows).to(self.class_table.dtype)
        elif not self.far.config.masked:
            x = self.class_table.new_zeros((1, self.far.config.tokens, self.far.config.channels)).expand(rows, -1, -1)
        if visible is not None and restore is not None:
            visible, restore = repeat_for_guidance(visible, rows), repeat_for_guidance(restore, rows)
        z = self.far.features(x, gather_rows(self.class_table, labels), visible, restore)
        number = self.class_table.new_full((1,), self.step.number) if self.step is not None else level
        return self.far.diffloss.net.condition(z, number)


class DenoiseStageModule(nn.Module):
    """One diffusion step: state, history and noise [B, T, C], condition [g B, T, head width], timestep [1],
    coefficients [8] and guidance [B] -> next state and next history [B, T, C].

    The guided prediction is uncond + guidance (cond - uncond), with a guidance scale per picture; the variance is that
    of the conditional half. The update is that of `far_runtime.sampling.solvers.Diffusion.table`. The timestep is
    embedded once for all rows.
    """

    def __init__(self, far: FAR) -> None:
        super().__init__()
        self.net = far.diffloss.net

    def forward(
        self,
        state: Tensor,
        condition: Tensor,
        timestep: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        noise: Tensor,
        history: Tensor,
    ) -> tuple[Tensor, Tensor]:
        batch, rows = state.shape[0], condition.shape[0]
        dtype = self.net.input_proj.weight.dtype
        out = self.net(repeat_for_guidance(state, rows).to(dtype), timestep, condition.to(dtype)).float()
        island("update")
        prediction, variance = gather_rows(out, torch.arange(batch, device=state.device)).chunk(2, dim=-1)
        # Without guidance these are the same rows.
        last = gather_rows(out, torch.arange(rows - batch, rows, device=state.device))
        unconditional = last.chunk(2, dim=-1)[0]
        prediction = unconditional + guidance[:, None, None] * (prediction - unconditional)
        factors = dict(zip(COEFFICIENTS, coefficients.unbind(0), strict=True))
        fraction = (variance + 1) / 2
        deviation = torch.exp(0.5 * (fraction * factors["log_beta"] + (1 - fraction) * factors["log_posterior"]))
        drift = factors["state"] * state + factors["output"] * prediction + factors["history"] * history
        predicted = factors["x0_state"] * state + factors["x0_output"] * prediction
        return drift + factors["noise"] * deviation * noise, predicted


def transformer_inputs(config: FARConfig, step: Step | None = None) -> tuple[Input, ...]:
    """Inputs of the transformer stage.

    With a folded step there is no level and no lowpass, and for a step that sees nothing yet (low-pass level 0, or no
    visible token) no latents and indices either.
    """
    labels = Input("labels", ("rows",), "int64", config.classes + 1)
    if step is not None and step.constants["count" if config.masked else "lowpass"] == 0:
        return (labels,)
    inputs = [Input("latents", ("batch", config.tokens, config.channels)), labels]
    if step is None:
        inputs += [Input("level", (1,), "int64", config.grid), Input("lowpass", (1,), "int64", config.grid + 1)]
    if config.masked:
        count: int | str = "count" if step is None else step.constants["count"]
        inputs.append(Input("visible", ("batch", count), "int64", config.tokens))
        inputs.append(Input("restore", ("batch", config.tokens), "int64", count))
    return tuple(inputs)


def transformer_stage(far: FAR, step: Step | None = None) -> Stage:
    """The transformer for any level, or with the constants of one step folded in."""
    config = far.config
    inputs = transformer_inputs(config, step)
    sizes = {"batch": BATCH, "rows": ROWS, "count": (0, config.tokens // 2, config.tokens)}
    return Stage(
        stage="transformer",
        module=TransformerStageModule(far, step).eval(),
        inputs=inputs,
        outputs=(TensorSpec("condition", "float32", ("rows", config.tokens, config.head_width)),),
        profile={axis: sizes[axis] for spec in inputs for axis in spec.shape if isinstance(axis, str)},
        fp32_islands=("norm", "z_proj_ln", "softmax", "lowpass"),
        constants={name: value for name, value in step.constants.items() if config.masked or name != "count"}
        if step
        else {},
        flops=_transformer_flops(config),
        suffix="" if step is None else f"_{step.index:02d}_level{step.number:02d}",
    )


def denoise_stage(model: nn.Module, tokens: int | str) -> Stage:
    """The diffusion head with guidance and the solver's update.

    model: FAR, FAR-T2I or MAR. tokens: of a picture, or the name of an axis of any length.
    """
    config = model.config
    state = (tokens, config.channels)
    module = DenoiseStageModule(model).eval()
    count = tokens if isinstance(tokens, int) else 1
    latents, condition = (torch.empty(1, count, n, device="meta") for n in (config.channels, config.head_width))
    scalars = [torch.empty(n, device="meta") for n in (1, len(COEFFICIENTS), 1)]
    inputs = (latents, condition, *scalars, latents, latents)
    profile = {"batch": BATCH, "rows": ROWS}
    return Stage(
        stage="denoise",
        module=module,
        inputs=(
            Input("state", ("batch", *state)),
            Input("condition", ("rows", tokens, config.head_width)),
            Input("timestep", (1,)),
            Input("coefficients", (len(COEFFICIENTS),)),
            Input("guidance", ("batch",)),
            Input("noise", ("batch", *state)),
            Input("history", ("batch", *state)),
        ),
        outputs=(
            TensorSpec("next_state", "float32", ("batch", *state)),
            TensorSpec("next_history", "float32", ("batch", *state)),
        ),
        profile=profile if isinstance(tokens, int) else {**profile, tokens: (1, 8, config.tokens)},
        fp32_islands=("in_ln", "norm_final", "timestep_sinusoids", "update"),
        flops={"" if isinstance(tokens, int) else tokens: count_flops(module, inputs)},
    )


def place_stage(config: FARConfig | FART2IConfig) -> Stage:
    """Puts tokens into a picture's latents: those that an edit keeps (FAR), or that an iteration has drawn (MAR)."""
    shape = ("batch", config.tokens, config.channels)
    return Stage(
        stage="place",
        module=PlaceStageModule().eval(),
        inputs=(
            Input("latents", shape),
            Input("sample", ("batch", "tokens", config.channels)),
            Input("index", ("batch", config.tokens), "int64", config.tokens),
        ),
        outputs=(TensorSpec("latents_out", "float32", shape),),
        profile={"batch": BATCH, "tokens": (1, config.tokens // 2, config.tokens)},
        tolerance=1e-6,  # a copy
        fp32_islands=("place",),
    )


def stages(far: FAR, steps: Iterable[Step] | None = None) -> list[Stage]:
    """The stages that a picture is drawn with: transformer (one graph, or one for each of `steps`) and denoise."""
    transformers = [transformer_stage(far)] if steps is None else [transformer_stage(far, step) for step in steps]
    return [*transformers, denoise_stage(far, far.config.tokens)]


def _transformer_flops(config: FARConfig) -> dict[str, float]:
    """FLOPs of a row: constant, or by the visible tokens of a masked model."""
    with torch.device("meta"):
        far = FAR(config)
    if not config.masked:
        return {"": features_flops(far, None)}
    return flops_by_visible_tokens(lambda count: features_flops(far, count), config.tokens)
