"""One call of FAR-B's diffusion head in its possible forms, beside the machine's matrix products.

    python scripts/bench/head.py [--pictures 1 --pictures 4] [--tokens 256] [--rounds 5]

There are three forms: as exported; with the AdaLN modulations of all blocks and of the final layer as one matrix
product, since all of them read SiLU(y); and with three diffusion steps in one graph. The first two are also quantised
to INT8. Weights are random and activations are quantised at +-8, which is enough for timing. OpenVINO runs in f32 and
with the bf16 hint, ONNX Runtime in FP32 and INT8. MAR calls the head with --tokens 4 or 8 in its early iterations.

Times are medians over interleaved rounds in one process. The share is of the rate of a 2048 x 2048 product by OpenVINO
in the same precision, measured in the same rounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import onnx
import torch
from torch import Tensor, nn

from far_export.onnx.quantize import matmuls_of, quantize_graph
from far_export.onnx.writer import export_stages
from far_export.stages.far import DenoiseStageModule, denoise_stage
from far_export.stages.stage import Stage
from far_models.far import FAR, PRESETS
from far_models.head import DiffusionHead, modulate
from far_runtime.bench.matmul_rate import openvino_product
from far_runtime.bundle import Graph
from timing import median_seconds

RANGE = 8.0

SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "SNIPPETS_MODE": "DISABLE"}


class OneModulation(nn.Module):
    """The head with all its modulations as one matrix product of SiLU(y)."""

    def __init__(self, net: DiffusionHead) -> None:
        super().__init__()
        self.net = net
        self.input_proj = net.input_proj
        layers: list[Any] = [*net.res_blocks, net.final_layer]
        linears = [layer.adaLN_modulation[1] for layer in layers]
        self.sizes = [linear.out_features for linear in linears]
        self.modulations = nn.Linear(linears[0].in_features, sum(self.sizes))
        with torch.no_grad():
            self.modulations.weight.copy_(torch.cat([linear.weight for linear in linears]))
            self.modulations.bias.copy_(torch.cat([linear.bias for linear in linears]))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        y = nn.functional.silu(self.net.time_embed(t) + condition)
        *blocks, last = self.modulations(y).split(self.sizes, dim=-1)
        x = self.net.input_proj(x)
        for block, modulation in zip(self.net.res_blocks, blocks, strict=True):
            shift, scale, gate = modulation.chunk(3, dim=-1)
            x = x + gate * block.mlp(modulate(block.in_ln(x), shift, scale))
        shift, scale = last.chunk(2, dim=-1)
        out: Tensor = self.net.final_layer.linear(modulate(self.net.final_layer.norm_final(x), shift, scale))
        return out


class SeveralSteps(nn.Module):
    """Several diffusion steps in one graph, each at its own timestep.

    At one timestep all steps would have the same modulations, which an engine may compute once.
    """

    def __init__(self, step: DenoiseStageModule, count: int) -> None:
        super().__init__()
        self.step, self.count = step, count

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
        for step in range(self.count):
            now = timestep * (1 - 0.25 * step)
            state, history = self.step(state, condition, now, coefficients, guidance, noise, history)
        return state, history


def quantized(path: Path, stage: Stage) -> Path:
    """The exported graph with the products in INT8 that an INT8 bundle quantises, in a file beside it."""
    graph = Graph(stage.name, stage.stage, path.name, tuple(one.spec for one in stage.inputs), stage.outputs, 1.0)
    products = matmuls_of(path, graph, PRESETS["far_base"].channels)
    ranges = {one.activation: RANGE for one in products}
    made = path.with_name("int8.onnx")
    onnx.save(quantize_graph(onnx.load(str(path)), products, ranges), str(made))
    return made


def at_tokens(stage: Stage, before: int, tokens: int) -> Stage:
    """The stage with `tokens` tokens per picture instead of `before`, in its shapes and its FLOPs."""
    inputs = tuple(replace(one, shape=tuple(tokens if n == before else n for n in one.shape)) for one in stage.inputs)
    outputs = tuple(replace(one, shape=tuple(tokens if n == before else n for n in one.shape)) for one in stage.outputs)
    return replace(stage, inputs=inputs, outputs=outputs, flops={"": stage.flops[""] * tokens / before})


def inputs_of(stage: Stage, pictures: int) -> dict[str, Any]:
    """Random inputs of a guided call; scalars are small, so that several steps stay finite."""
    made = stage.example({"batch": pictures, "rows": 2 * pictures})
    return {name: (tensor if tensor.dim() > 1 else 0.1 * tensor).numpy() for name, tensor in made.items()}


def forms(tokens: int) -> dict[str, tuple[Stage, int]]:
    """Stage and number of diffusion steps of every form, with `tokens` tokens per picture."""
    torch.manual_seed(0)
    far = FAR(PRESETS["far_base"]).eval()
    for parameter in far.parameters():
        nn.init.normal_(parameter, std=0.02)
    stage = at_tokens(denoise_stage(far, far.config.tokens), far.config.tokens, tokens)
    fused: Any = DenoiseStageModule(far)
    fused.net = OneModulation(far.diffloss.net)
    several = SeveralSteps(DenoiseStageModule(far), 3)
    return {
        "as exported": (stage, 1),
        "one modulation": (replace(stage, module=fused.eval()), 1),
        "3 steps a graph": (replace(stage, module=several.eval()), 3),
    }


def openvino_call(path: Path, hint: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A call of the graph by OpenVINO with a precision hint."""
    import openvino as ov

    compiled = ov.Core().compile_model(str(path), "CPU", {**SETTINGS, "INFERENCE_PRECISION_HINT": hint})
    request = compiled.create_infer_request()
    for name, array in inputs.items():
        request.set_tensor(name, ov.Tensor(array))
    return lambda: request.infer()


def onnxruntime_call(path: Path, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A call of the graph by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


@click.command(help=__doc__)
@click.option(
    "--pictures",
    "counts",
    type=int,
    multiple=True,
    default=(1,),
    show_default=True,
    help="Pictures of a call; may be repeated.",
)
@click.option("--tokens", type=int, default=256, show_default=True, help="Tokens of a picture that a call denoises.")
@click.option("--rounds", type=int, default=5, show_default=True, help="Rounds; the times are medians over them.")
def main(counts: Sequence[int], tokens: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as aside:
        made = forms(tokens)
        paths: dict[str, tuple[Path, int, dict[str, str]]] = {}
        for name, (stage, steps) in made.items():
            folder = Path(aside) / name
            folder.mkdir()
            export_stages([stage], folder)
            float_kinds, int_kinds = {"f32": "fp32", "bf16": "bf16"}, {"f32": "int8", "bf16": "int8"}
            paths[name] = (folder / "denoise.onnx", steps, float_kinds)
            if steps == 1:
                paths[f"int8, {name}"] = (quantized(folder / "denoise.onnx", stage), steps, int_kinds)
        flops = made["as exported"][0].flops[""]
        for count in counts:
            inputs = inputs_of(made["as exported"][0], count)
            ways: dict[str, Callable[[], Any]] = {}
            work: dict[str, tuple[str, float]] = {}
            for precision in ("fp32", "bf16", "int8"):
                product = openvino_product("cpu", precision, 2048, None)
                if product is not None:
                    ways[f"product {precision}"] = product
                    work[f"product {precision}"] = (precision, 2.0 * 2048**3)
            for name, (path, steps, kinds) in paths.items():
                for hint, precision in kinds.items():
                    key = f"{name}, openvino {hint}"
                    ways[key], work[key] = openvino_call(path, hint, inputs), (precision, steps * 2 * count * flops)
            for name in ("as exported", "int8, as exported"):
                key = f"{name}, onnxruntime"
                ways[key] = onnxruntime_call(paths[name][0], inputs)
                work[key] = ("int8" if name.startswith("int8") else "fp32", 2 * count * flops)
            found = median_seconds(ways, rounds)
            click.echo(
                f"\n{count} pictures, {2 * tokens * count} rows\n\n"
                "| form | ms | GFLOP/s | of the product |\n| --- | ---: | ---: | ---: |"
            )
            for key, seconds in found.items():
                precision, operations = work[key]
                rate = operations / seconds
                of = rate / (work[f"product {precision}"][1] / found[f"product {precision}"])
                click.echo(f"| {key} | {1000 * seconds:.1f} | {rate / 1e9:.0f} | {100 * of:.0f} % |")


if __name__ == "__main__":
    main()
