"""FAR's stages as torch modules: transformer (with the low-pass filter in front), denoise (with guidance and solver
update) and place (tokens by index)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from far_export.stages.flops import count_flops
from far_export.stages.stage import Input, Stage
from far_models.far import FAR, FARConfig
from far_models.far_t2i import FART2IConfig
from far_models.islands import island
from far_runtime.bundle import TensorSpec
from far_runtime.sampling.base import Step
from far_runtime.sampling.lowpass import lowpass_matrices
from far_runtime.sampling.solvers import COEFFICIENTS


def spread(x: Tensor, rows: int) -> Tensor:
    """[B, ...] repeated to [rows, ...] with rows = g B: the conditional rows, then the same pictures'
    unconditional ones."""
    pictures = torch.arange(x.shape[0], device=x.device)
    return pick(x, pick(torch.cat([pictures, pictures]), torch.arange(rows, device=x.device)))


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, ...] at `rows` [n]: a Gather, where plain indexing would export as GatherND."""
    return x.index_select(0, rows)


def lowpassed(latents: Tensor, matrix: Tensor) -> Tensor:
    """matrix [side, side] x latents x matrix^T over the grid of latents [B, side^2, C]; two matrix products."""
    side, channels = matrix.shape[0], latents.shape[-1]
    x = matrix @ latents.reshape(-1, side, side * channels)
    x = matrix @ x.reshape(-1, side, channels)
    return x.reshape(-1, side * side, channels)


class TransformerStageModule(nn.Module):
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
            matrix = self.lowpass if lowpass is None else pick(self.lowpass, lowpass).squeeze(0)
            x = spread(lowpassed(latents, matrix), rows).to(self.class_table.dtype)
        elif not self.far.config.masked:
            x = self.class_table.new_zeros((1, self.far.config.tokens, self.far.config.channels)).expand(rows, -1, -1)
        if visible is not None and restore is not None:
            visible, restore = spread(visible, rows), spread(restore, rows)
        z = self.far.features(x, pick(self.class_table, labels), visible, restore)
        number = self.class_table.new_full((1,), self.step.number) if self.step is not None else level
        return self.far.diffloss.net.condition(z, number)


class DenoiseStageModule(nn.Module):
    """One diffusion step: state and history [B, T, C], condition [g B, T, w], the step's scalars and guidance [B] ->
    next state and next history [B, T, C].

    Guided prediction o = uncond + guidance (cond - uncond), by a scale a picture, variance values from the conditional
    half, then the update of `far_runtime.sampling.solvers.Diffusion.table`. The timestep is embedded once for all rows.
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
        out = self.net(spread(state, rows).to(dtype), timestep, condition.to(dtype)).float()
        island("update")
        prediction, variance = pick(out, torch.arange(batch, device=state.device)).chunk(2, dim=-1)
        last = pick(out, torch.arange(rows - batch, rows, device=state.device))  # without guidance: the same rows
        unconditional = last.chunk(2, dim=-1)[0]
        prediction = unconditional + guidance[:, None, None] * (prediction - unconditional)
        factors = dict(zip(COEFFICIENTS, coefficients.unbind(0), strict=True))
        fraction = (variance + 1) / 2
        deviation = torch.exp(0.5 * (fraction * factors["log_beta"] + (1 - fraction) * factors["log_posterior"]))
        drift = factors["state"] * state + factors["output"] * prediction + factors["history"] * history
        predicted = factors["x0_state"] * state + factors["x0_output"] * prediction
        return drift + factors["noise"] * deviation * noise, predicted


def transformer_inputs(config: FARConfig, step: Step | None = None) -> tuple[Input, ...]:
    """Inputs of the transformer stage. A folded step leaves level and lowpass out, and a step that sees nothing yet
    (low-pass level 0, or no visible token) the latents and their indices too."""
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
    sizes = {"batch": (1, 4, 64), "rows": (1, 8, 128), "count": (0, config.tokens // 2, config.tokens)}
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
    """The diffusion head with guidance and solver update, over so many tokens a picture (a text: an axis of any
    length)."""
    config = model.config
    state = (tokens, config.channels)
    module = DenoiseStageModule(model).eval()
    count = tokens if isinstance(tokens, int) else 1
    meta = torch.empty(1, count, config.channels, device="meta")
    row = (meta, torch.empty(1, count, config.head_width, device="meta"))
    scalars = [torch.empty(n, device="meta") for n in (1, len(COEFFICIENTS), 1)]
    profile = {"batch": (1, 4, 64), "rows": (1, 8, 128)}
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
        flops={"" if isinstance(tokens, int) else tokens: count_flops(module, (*row, *scalars, meta, meta))},
    )


class PlaceStageModule(nn.Module):
    """latents [B, L, C], sample [B, T, C], index [B, L] -> [B, L, C]: at every position the token of that number among
    the latents' and then the sample's."""

    def forward(self, latents: Tensor, sample: Tensor, index: Tensor) -> Tensor:
        both = torch.cat([latents, sample], dim=1)
        return both.gather(1, index.unsqueeze(-1).expand(-1, -1, both.shape[-1]))


def place_stage(config: FARConfig | FART2IConfig) -> Stage:
    """Tokens put into a picture's latents: what an edit keeps (FAR), what an iteration has drawn (MAR)."""
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
        profile={"batch": (1, 4, 64), "tokens": (1, config.tokens // 2, config.tokens)},
        tolerance=1e-6,  # a copy
        fp32_islands=("place",),
    )


def stages(far: FAR, steps: Iterable[Step] | None = None) -> list[Stage]:
    """Transformer (one graph, or one per step) and denoise stages of a FAR model."""
    transformers = [transformer_stage(far)] if steps is None else [transformer_stage(far, step) for step in steps]
    return [*transformers, denoise_stage(far, far.config.tokens)]


def _transformer_flops(config: FARConfig) -> dict[str, float]:
    """Arithmetic of a row: constant, or (masked) in the visible tokens."""
    with torch.device("meta"):
        far = FAR(config)
    if not config.masked:
        return {"": features_flops(far, None)}
    return in_visible_tokens(lambda count: features_flops(far, count), config.tokens)


def in_visible_tokens(flops: Callable[[int], float], tokens: int) -> dict[str, float]:
    """The arithmetic of a row with a number of visible tokens as a polynomial in that number, the axis `count`."""
    points = (1, tokens // 2, tokens)  # not 0: without any visible token FAR-T2I runs no encoder at all
    values = torch.tensor([flops(n) for n in points], dtype=torch.float64)
    matrix = torch.tensor([[1.0, p, p * p] for p in points], dtype=torch.float64)
    return dict(zip(("", "count", "count count"), torch.linalg.solve(matrix, values).tolist(), strict=True))


def features_flops(far: FAR, visible: int | None) -> float:
    """Arithmetic of a row of encoder, decoder and the projection of z; `far` lies on the meta device."""
    config = far.config
    inputs = [
        torch.empty(1, config.tokens, config.channels, device="meta"),
        torch.empty(1, config.encoder_width, device="meta"),
    ]
    if visible is not None:
        inputs += [torch.empty(1, n, dtype=torch.int64, device="meta") for n in (visible, config.tokens)]
    projection = 2.0 * config.tokens * config.decoder_width * config.head_width
    return count_flops(far.features, tuple(inputs)) + projection
