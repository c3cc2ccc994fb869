"""Compare this project with golden cases: what the official code computes from named weights and named noise.

    python scripts/check_golden.py CASE_DIR... [--engine torch|onnxruntime]

Every case is rebuilt from its case.json: the weights are drawn from their names and saved as a checkpoint in the
official layout, which the ordinary loader reads; the stages are made (exported, for onnxruntime), and the ordinary
loop runs with the named noise. Prints one JSON line per case and exits with 1 if any case fails.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from far_export.engines import ENGINES, engine_of
from far_export.graphs import far as far_graphs
from far_export.graphs import vae as vae_graphs
from far_models.checkpoint import load_checkpoint
from far_runtime.engines.base import Engine
from far_runtime.errors import FarError
from far_runtime.samplers import far as far_loop
from far_runtime.schedule import make_schedule

STAGE_TOLERANCE = 1e-4
LOOP_TOLERANCE = 1e-3
LATENT_SCALE = 0.2325
TABLES = {"class_emb", "lvl_embed", "embedding"}


def stream(name: str, seed: int = 0) -> np.random.RandomState:
    """The random stream that belongs to a name; NumPy freezes it (NEP 19)."""
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)


def weight(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The parameter of that name: gains 1 + 0.1 n, biases 0.1 n, matrices n / sqrt(fan-in) (a twentieth for the
    head's output), tables 0.5 n."""
    n = noise(name, shape, seed)
    module, _, leaf = name.rpartition(".")
    if leaf == "weight" and len(shape) == 1:
        return 1 + np.float32(0.1) * n
    if leaf == "bias":
        return np.float32(0.1) * n
    if leaf == "weight" and module.rpartition(".")[2] not in TABLES:
        gain = 0.05 if "final_layer.linear" in name else 1.0
        return n * np.float32(gain / np.sqrt(np.prod(shape[1:])))
    return np.float32(0.5) * n


def noise(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Standard normal noise of that name."""
    return stream(name, seed).standard_normal(shape).astype(np.float32)


class NamedNoise:
    """The draws of a golden case, numbered in the order in which the official sampler asks for them.

    A step with S diffusion steps asks for one start noise [n, C] and S draws [2 n, C], of which the first half
    counts.
    """

    def __init__(self, batch: int, steps: tuple[int, ...], seed: int) -> None:
        self.batch, self.seed = batch, seed
        self.first = np.concatenate([[0], np.cumsum([1 + count for count in steps])])

    def start(self, step: int, tokens: int, channels: int) -> NDArray[np.float32]:
        return self._draw(step, 0, 1, tokens, channels)

    def diffusion(self, step: int, draw: int, tokens: int, channels: int) -> NDArray[np.float32]:
        return self._draw(step, 1 + draw, 2, tokens, channels)

    def orders(self, tokens: int) -> NDArray[np.int64]:
        return np.stack([stream(f"order_{i:04d}", self.seed).permutation(tokens) for i in range(self.batch)]).astype(
            np.int64
        )

    def _draw(self, step: int, draw: int, halves: int, tokens: int, channels: int) -> NDArray[np.float32]:
        count = self.batch * tokens
        drawn = noise(f"draw_{self.first[step] + draw:04d}", (halves * count, channels), self.seed)
        return drawn[:count].reshape(self.batch, tokens, channels)


class Recorder:
    """An engine that passes everything on and keeps the transformer's outputs and every level's sample."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name = engine, engine.name
        self.conditions: list[NDArray[Any]] = []
        self.samples: list[NDArray[Any]] = []
        self.put, self.get, self.close = engine.put, engine.get, engine.close

    def run(self, stage: str, inputs: Any, constants: Any = None) -> dict[str, Any]:
        outputs = self.engine.run(stage, inputs, constants)
        if stage == "transformer":
            self.conditions.append(self.get(outputs["condition"]))
        return outputs

    def on_step(self, step: far_loop.Step, done: int, state: Any) -> None:
        if done == step.diffusion_steps:
            self.samples.append(self.get(state).copy())


def relative_error(a: NDArray[Any], b: NDArray[Any]) -> float:
    """||a - b|| / ||b||; infinite where a is not finite or the shapes differ."""
    if a.shape != b.shape or not np.isfinite(a).all():
        return math.inf
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def save_checkpoint(case: dict[str, Any], path: Path, key: str) -> None:
    """The case's weights as the official code saves them: a state dict under `key`, with the training arguments
    beside it."""
    seed = case["seed"]
    tensors = {n: torch.from_numpy(weight(n, tuple(shape), seed)) for n, shape in case["parameters"].items()}
    torch.save({key: tensors, "args": argparse.Namespace(mask=case.get("mask", False))}, path)


def check_far(
    case: dict[str, Any], expected: dict[str, NDArray[Any]], engine_name: str, folder: Path
) -> dict[str, float]:
    """Relative errors of z (every 16th token, as the head's condition without its level part), samples and final
    latents."""
    save_checkpoint(case, folder / "checkpoint-last.pth", "model_ema")
    heads = {k.replace("num_heads", "heads"): v for k, v in case["dims"].items() if k.endswith("num_heads")}
    far = load_checkpoint(folder / "checkpoint-last.pth", overrides=heads, expect="far").model
    config = far.config
    if config.masked != case["mask"]:
        raise FarError(f"the loader reads masked={config.masked}, the case says {case['mask']}")
    levels, labels = tuple(case["levels"]), case.get("labels") or [config.classes] * case["batch"]
    # A case may use any list of levels; the official unmasked sampler takes no temperature.
    made = make_schedule(
        range(len(levels)),
        grid=len(levels),
        masked=config.masked,
        guidance=case["cfg"],
        steps=case["diffusion_steps"],
        temperature=case.get("temperature", 1.0) if config.masked else 1.0,
    )
    schedule, batch = replace(made, levels=levels), len(labels)
    recorder = Recorder(engine_of(far_graphs.stages(far), engine_name, folder / "bundle"))
    source = NamedNoise(batch, schedule.steps, case["seed"])
    model = vars(config)
    latents = recorder.get(far_loop.sample(recorder, model, schedule, labels, source, recorder.on_step))
    net = far.diffloss.net
    projected, wanted = [], []
    for level, condition, z in zip(schedule.levels, recorder.conditions, expected["z_every_16th"], strict=True):
        of_level = (net.index_cond_embed.weight[:, 0] * level + net.index_cond_embed.bias + net.cond_embed.bias).numpy()
        projected.append(condition[:, ::16].astype(np.float64) - of_level)
        rows = z.astype(np.float64) @ net.cond_embed.weight.numpy().T.astype(np.float64)
        wanted.append(rows[: len(condition)])  # a step without guidance has no unconditional rows here
    cells = latents.reshape(batch, config.grid, config.grid, config.channels).transpose(0, 3, 1, 2)
    samples = np.stack(recorder.samples).reshape(len(schedule), -1, config.channels)
    return {
        "z_every_16th": max(relative_error(a, b) for a, b in zip(projected[:1], wanted[:1], strict=True)),
        "z_every_16th_all_levels": relative_error(np.concatenate(projected), np.concatenate(wanted)),
        "sampled": relative_error(samples, expected["sampled"]),
        "latents": relative_error(cells, expected["latents"]),
    }


def check_klvae(
    case: dict[str, Any], expected: dict[str, NDArray[Any]], engine_name: str, folder: Path
) -> dict[str, float]:
    """Relative errors of the decoded image and of the encoder's mean and log variance."""
    save_checkpoint(case, folder / "kl.ckpt", "model")
    vae = load_checkpoint(folder / "kl.ckpt", expect="klvae").model
    latents = noise("latents", _shape(case["latents"]), case["seed"])
    images = np.tanh(noise("images", _shape(case["images"]), case["seed"]))
    batch, channels, side, _ = latents.shape
    stages = [
        vae_graphs.decode_stage(vae, side, LATENT_SCALE, pixels=False),
        vae_graphs.encode_stage(vae, *images.shape[2:]),
    ]
    engine = engine_of(stages, engine_name, folder / "bundle")
    tokens = latents.transpose(0, 2, 3, 1).reshape(batch, side * side, channels)
    image = engine.run("decode", {"latents": engine.put(tokens)})["image"]
    moments = engine.run("encode", {"images": engine.put(images)})
    got = {"image": image, "mean": moments["mean"], "logvar": moments["logvar"]}
    return {name: relative_error(engine.get(array), expected[name]) for name, array in got.items()}


def _shape(text: str) -> tuple[int, ...]:
    """The shape that a case's description of a draw names, as in "noise('latents', (2, 16, 4, 4))"."""
    found = re.search(r"\(([\d, ]+)\)", text)
    if found is None:
        raise FarError(f"no shape in {text!r}; expected noise(NAME, (N, ...))")
    return tuple(int(part) for part in found[1].split(",") if part.strip())


CHECKS: dict[str, Callable[..., dict[str, float]]] = {"far": check_far, "klvae": check_klvae}
LOOP_ARRAYS = {"sampled", "latents", "z_every_16th_all_levels"}


def check_case(folder: Path, engine_name: str) -> dict[str, Any]:
    """The JSON line of one case."""
    result: dict[str, Any] = {"case": folder.name, "engine": engine_name, "errors": {}, "passed": False}
    try:
        case = json.loads((folder / "case.json").read_text())
        with np.load(folder / "expected.npz", allow_pickle=False) as arrays:
            expected = dict(arrays)
        if case["system"] not in CHECKS:
            raise FarError(f"system {case['system']!r}; known: {', '.join(CHECKS)}")
        with tempfile.TemporaryDirectory() as aside:
            errors = CHECKS[case["system"]](case, expected, engine_name, Path(aside))
    except (FarError, OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        return {**result, "problem": f"{type(error).__name__}: {error}"}
    limits = {name: LOOP_TOLERANCE if name in LOOP_ARRAYS else STAGE_TOLERANCE for name in errors}
    return {**result, "errors": errors, "passed": all(errors[name] <= limits[name] for name in errors)}


@click.command(help=__doc__)
@click.argument("cases", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--engine", type=click.Choice(ENGINES), default="torch", show_default=True)
def main(cases: tuple[Path, ...], engine: str) -> None:
    passed = True
    for folder in cases:
        result = check_case(folder, engine)
        passed &= result["passed"]
        click.echo(json.dumps(result))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
