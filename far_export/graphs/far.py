"""FAR's stages as torch modules: transformer (with the low-pass filter in front) and denoise (with guidance and
solver update)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from far_export.flops import count_flops
from far_export.stages import Input, Stage
from far_models.far import FAR, FARConfig
from far_runtime.bundle import TensorSpec
from far_runtime.diffusion import COEFFICIENTS
from far_runtime.frequency import lowpass_matrices
from far_runtime.samplers.far import Step


def spread(x: Tensor, rows: int) -> Tensor:
    """[B, ...] repeated to [rows, ...] with rows = g B: the conditional rows, then the same pictures'
    unconditional ones."""
    pictures = torch.arange(x.shape[0], device=x.device)
    return pick(x, pick(torch.cat([pictures, pictures]), torch.arange(rows, device=x.device)))


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, ...] at `rows` [n]: a Gather, where plain indexing would export as GatherND."""
    return x.index_select(0, rows)


class TransformerGraph(nn.Module):
    """latents [B, L, C] (the previous sample, unfiltered), labels [g B] -> head condition [g B, L, head width].

    Filters the latents to level `lowpass`, runs encoder and decoder, and ends with all of the head that does not
    depend on the diffusion step: the projection of z and the embedding of the level. `step` folds its level, filter
    and token count in.
    """

    lowpass: Tensor
    class_table: Tensor

    def __init__(self, far: FAR, step: Step | None = None) -> None:
        super().__init__()
        self.far = far
        self.step = step
        matrices = torch.from_numpy(lowpass_matrices(far.config.grid).copy())
        self.register_buffer("lowpass", matrices if step is None else matrices[step.lowpass])
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
            matrix = self.lowpass if lowpass is None else pick(self.lowpass, lowpass).squeeze(0)
            x = spread(self.filter(latents, matrix), rows)
        elif not self.far.config.masked:
            x = self.class_table.new_zeros((1, self.far.config.tokens, self.far.config.channels)).expand(rows, -1, -1)
        if visible is not None and restore is not None:
            visible, restore = spread(visible, rows), spread(restore, rows)
        z = self.far.features(x, pick(self.class_table, labels), visible, restore)
        number = self.class_table.new_full((1,), self.step.level) if self.step is not None else level
        return self.far.diffloss.net.condition(z, number)

    def filter(self, latents: Tensor, matrix: Tensor) -> Tensor:
        """matrix x matrix^T over the grid of latents [B, L, C]; two matrix products."""
        side, channels = self.far.config.grid, self.far.config.channels
        x = matrix @ latents.reshape(-1, side, side * channels)
        x = matrix @ x.reshape(-1, side, channels)
        return x.reshape(-1, side * side, channels)


class DenoiseGraph(nn.Module):
    """One diffusion step: state [B, T, C], condition [g B, T, w] and the step's scalars -> next state [B, T, C].

    Guided prediction o = uncond + guidance (cond - uncond), variance values from the conditional half, then the
    update of `far_runtime.diffusion.ddpm_table`. The timestep is embedded once for all rows.
    """

    def __init__(self, far: FAR) -> None:
        super().__init__()
        self.net = far.diffloss.net

    def forward(
        self, state: Tensor, condition: Tensor, timestep: Tensor, coefficients: Tensor, guidance: Tensor, noise: Tensor
    ) -> Tensor:
        batch, rows = state.shape[0], condition.shape[0]
        out = self.net(spread(state, rows), timestep, condition)
        prediction, variance = pick(out, torch.arange(batch, device=state.device)).chunk(2, dim=-1)
        last = pick(out, torch.arange(rows - batch, rows, device=state.device))  # without guidance: the same rows
        unconditional = last.chunk(2, dim=-1)[0]
        prediction = unconditional + guidance * (prediction - unconditional)
        at_state, at_output, log_beta, log_posterior, at_noise = coefficients.unbind(0)
        fraction = (variance + 1) / 2
        deviation = torch.exp(0.5 * (fraction * log_beta + (1 - fraction) * log_posterior))
        return at_state * state + at_output * prediction + at_noise * deviation * noise


def transformer_inputs(config: FARConfig, step: Step | None = None) -> tuple[Input, ...]:
    """Inputs of the transformer stage. A folded step leaves level and lowpass out, and a step that sees nothing yet
    (low-pass level 0, or no visible token) the latents and their indices too."""
    labels = Input("labels", ("rows",), "int64", config.classes + 1)
    if step is not None and (step.visible == 0 if config.masked else step.lowpass == 0):
        return (labels,)
    inputs = [Input("latents", ("batch", config.tokens, config.channels)), labels]
    if step is None:
        inputs += [Input("level", (1,), "int64", config.grid), Input("lowpass", (1,), "int64", config.grid + 1)]
    if config.masked:
        count: int | str = "count" if step is None else step.visible
        inputs.append(Input("visible", ("batch", count), "int64", config.tokens))
        inputs.append(Input("restore", ("batch", config.tokens), "int64", count))
    return tuple(inputs)


def transformer_stage(far: FAR, step: Step | None = None) -> Stage:
    """The transformer for any level, or with the constants of one step folded in."""
    config = far.config
    inputs = transformer_inputs(config, step)
    sizes = {"batch": (1, 4, 64), "rows": (1, 8, 128), "count": (0, config.tokens // 2, config.tokens)}
    return Stage(
        stage="transformer",
        module=TransformerGraph(far, step).eval(),
        inputs=inputs,
        outputs=(TensorSpec("condition", "float32", ("rows", config.tokens, config.head_width)),),
        profile={axis: sizes[axis] for spec in inputs for axis in spec.shape if isinstance(axis, str)},
        fp32_islands=("norm", "z_proj_ln", "softmax", "lowpass"),
        constants={name: value for name, value in step.constants.items() if config.masked or name != "count"}
        if step
        else {},
        flops=_transformer_flops(config),
        suffix="" if step is None else f"_{step.index:02d}_level{step.level:02d}",
    )


def denoise_stage(far: FAR) -> Stage:
    """The diffusion head with guidance and solver update."""
    config = far.config
    tokens = (config.tokens, config.channels)
    module = DenoiseGraph(far).eval()
    state = torch.empty(1, *tokens, device="meta")
    row = (state, torch.empty(1, config.tokens, config.head_width, device="meta"))
    scalars = [torch.empty(n, device="meta") for n in (1, len(COEFFICIENTS), 1)]
    return Stage(
        stage="denoise",
        module=module,
        inputs=(
            Input("state", ("batch", *tokens)),
            Input("condition", ("rows", config.tokens, config.head_width)),
            Input("timestep", (1,)),
            Input("coefficients", (len(COEFFICIENTS),)),
            Input("guidance", (1,)),
            Input("noise", ("batch", *tokens)),
        ),
        outputs=(TensorSpec("next_state", "float32", ("batch", *tokens)),),
        profile={"batch": (1, 4, 64), "rows": (1, 8, 128)},
        fp32_islands=("in_ln", "norm_final", "timestep_sinusoids", "update"),
        flops=(count_flops(module, (*row, *scalars, state)),),
    )


def stages(far: FAR, steps: Iterable[Step] | None = None) -> list[Stage]:
    """Transformer (one graph, or one per step) and denoise stages of a FAR model."""
    transformers = [transformer_stage(far)] if steps is None else [transformer_stage(far, step) for step in steps]
    return [*transformers, denoise_stage(far)]


def _transformer_flops(config: FARConfig) -> tuple[float, ...]:
    """Coefficients of 1, V, V^2 for V visible tokens (masked), or the one figure of a row (unmasked)."""
    with torch.device("meta"):
        far = FAR(config)
    if not config.masked:
        return (_features_flops(far, None),)
    points = (0, config.tokens // 2, config.tokens)
    values = torch.tensor([_features_flops(far, n) for n in points], dtype=torch.float64)
    matrix = torch.tensor([[1.0, p, p * p] for p in points], dtype=torch.float64)
    return tuple(torch.linalg.solve(matrix, values).tolist())


def _features_flops(far: FAR, visible: int | None) -> float:
    config = far.config
    inputs = [
        torch.empty(1, config.tokens, config.channels, device="meta"),
        torch.empty(1, config.encoder_width, device="meta"),
    ]
    if visible is not None:
        inputs += [torch.empty(1, n, dtype=torch.int64, device="meta") for n in (visible, config.tokens)]
    projection = 2.0 * config.tokens * config.decoder_width * config.head_width
    return count_flops(far.features, tuple(inputs)) + projection
