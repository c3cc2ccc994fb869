"""Golden cases of the systems with a diffusion head: FAR and MAR, and their KL-VAE."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from far_export.stages import far as far_graphs
from far_export.stages import mar as mar_graphs
from far_export.stages import vae as vae_graphs
from far_export.stages.stage import Stage
from far_models.checkpoint.load import load_checkpoint
from far_runtime.engines.base import Engine
from far_runtime.errors import FarError
from far_runtime.model_info import model_info
from far_runtime.sampling.base import Condition, Plan, Step, label_condition
from far_runtime.sampling.systems import SAMPLERS
from golden.draws import NamedNoise, noise, relative_error, save_checkpoint
from golden.stage_engine import engine_of

LATENT_SCALE = 0.2325


class Recorder:
    """An engine that keeps the transformer's outputs and the state at the end of every step."""

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

    def on_step(self, step: Step, done: int, state: Any) -> None:
        """Keep the state if it is the last one of its step."""
        if done == step.substeps:
            self.samples.append(self.get(state).copy())


def load_model(case: dict[str, Any], folder: Path, system: str) -> nn.Module:
    """The case's model, through a checkpoint in the official layout."""
    save_checkpoint(case, folder / "checkpoint-last.pth", "model_ema")
    heads = {k.replace("num_heads", "heads"): v for k, v in case["dims"].items() if k.endswith("num_heads")}
    return load_checkpoint(folder / "checkpoint-last.pth", overrides=heads, expect=system).model


def labels_of(case: dict[str, Any], null: int) -> list[int]:
    """The case's labels; the null class where a case has none."""
    return case.get("labels") or [null] * case["batch"]


def run_loop(
    system: str, config: Any, settings: dict[str, Any], recorder: Recorder, condition: Condition, seed: int
) -> tuple[NDArray[Any], Plan]:
    """The loop with the case's noise: latents [B, C, h, w] and the plan."""
    sampler = SAMPLERS[system]
    model = model_info(system, {**vars(config), "image_size": 0}, "the golden case")  # no loop reads the size
    plan = sampler.plan(model, settings)
    source = NamedNoise(condition.batch, tuple(step.substeps for step in plan), seed)
    latents = recorder.get(sampler.sample(recorder, model, plan, condition, source, recorder.on_step))
    return latents.reshape(condition.batch, model.grid, model.grid, model.channels).transpose(0, 3, 1, 2), plan


def check_far(
    case: dict[str, Any], expected: dict[str, NDArray[Any]], engine_name: str, folder: Path
) -> dict[str, float]:
    """Relative errors of z at every 16th token (see `z_errors`), of every step's samples and of the final latents."""
    far = load_model(case, folder, "far")
    config = far.config
    if config.masked != case["mask"]:
        raise FarError(f"the loader reads masked={config.masked}, the case says {case['mask']}")
    # A case may use any list of levels; the official unmasked sampler takes no temperature.
    settings = {
        "levels": case["levels"],
        "steps": case["diffusion_steps"],
        "guidance": case["cfg"],
        "temperature": case.get("temperature", 1.0) if config.masked else 1.0,
    }
    recorder = Recorder(engine_of(far_graphs.stages(far), engine_name, folder / "bundle"))
    condition = label_condition(recorder, labels_of(case, config.classes), config.classes)
    latents, plan = run_loop("far", config, settings, recorder, condition, case["seed"])
    return {
        **z_errors(far, recorder, plan, expected),
        "sampled": relative_error(samples_of(recorder, config.channels), expected["sampled"]),
        "latents": relative_error(latents, expected["latents"]),
    }


def samples_of(recorder: Recorder, channels: int) -> NDArray[Any]:
    """States at the end of every step, [steps, B L, C]."""
    return np.stack(recorder.samples).reshape(len(recorder.samples), -1, channels)


def z_errors(model: nn.Module, recorder: Recorder, plan: Plan, expected: dict[str, NDArray[Any]]) -> dict[str, float]:
    """Relative errors of z at every 16th token, of the first step and of all steps.

    The transformer stage ends with the head's condition, so z is projected to that, without its level part.
    """
    net = model.diffloss.net
    ours, official = [], []
    for step, condition, z in zip(plan, recorder.conditions, expected["z_every_16th"], strict=True):
        constant = net.cond_embed.bias
        if hasattr(net, "index_cond_embed"):
            constant = constant + net.index_cond_embed.weight[:, 0] * step.number + net.index_cond_embed.bias
        ours.append(condition[:, ::16].astype(np.float64) - constant.numpy())
        rows = z.astype(np.float64) @ net.cond_embed.weight.numpy().T.astype(np.float64)
        # A step without guidance has no unconditional rows here.
        official.append(rows[: len(condition)])
    return {
        "z_every_16th": relative_error(ours[0], official[0]),
        "z_every_16th_all_levels": relative_error(np.concatenate(ours), np.concatenate(official)),
    }


def check_mar(
    case: dict[str, Any], expected: dict[str, NDArray[Any]], engine_name: str, folder: Path
) -> dict[str, float]:
    """Relative errors of z at every 16th token that an iteration predicts, and of the final latents."""
    mar = load_model(case, folder, "mar")
    config = mar.config
    settings = {
        "iterations": case["iterations"],
        "steps": case["diffusion_steps"],
        "guidance": case["cfg"],
        "guidance_schedule": case.get("cfg_schedule", "linear"),
        "temperature": case.get("temperature", 1.0),
    }
    recorder = PredictedRecorder(engine_of(mar_graphs.stages(mar), engine_name, folder / "bundle"))
    condition = label_condition(recorder, labels_of(case, config.classes), config.classes)
    latents, plan = run_loop("mar", config, settings, recorder, condition, case["seed"])
    net = mar.diffloss.net
    ours, official = [], []
    for step, output, predicted, z in zip(
        plan, recorder.conditions, recorder.predicted, expected["z_every_16th"], strict=True
    ):
        rows = z.astype(np.float64) @ net.cond_embed.weight.numpy().T.astype(np.float64)
        halves = 1 if step.guidance == 1 else 2
        for row, positions in enumerate(np.tile(predicted, (halves, 1))):
            sixteenth = positions % 16 == 0
            ours.append(output[row, sixteenth].astype(np.float64) - net.cond_embed.bias.numpy())
            official.append(rows[row, positions[sixteenth] // 16])
    return {
        "z_every_16th_all_levels": relative_error(np.concatenate(ours), np.concatenate(official)),
        "latents": relative_error(latents, expected["latents"]),
    }


class PredictedRecorder(Recorder):
    """A Recorder that also keeps which tokens every iteration predicts."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.predicted: list[NDArray[Any]] = []

    def run(self, stage: str, inputs: Any, constants: Any = None) -> dict[str, Any]:
        if stage == "transformer":
            self.predicted.append(self.get(inputs["predicted"]).copy())
        return super().run(stage, inputs, constants)


def check_klvae(
    case: dict[str, Any], expected: dict[str, NDArray[Any]], engine_name: str, folder: Path
) -> dict[str, float]:
    """Relative errors of the decoded image and of the encoder's mean and log variance."""
    save_checkpoint(case, folder / "kl.ckpt", "model")
    vae = load_checkpoint(folder / "kl.ckpt", expect="klvae").model
    latents = noise("latents", _shape(case["latents"]), case["seed"])
    images = np.tanh(noise("images", _shape(case["images"]), case["seed"]))
    batch, channels, side, _ = latents.shape
    stages: list[Stage] = [
        vae_graphs.decode_stage(vae, side, LATENT_SCALE, pixels=False),
        vae_graphs.moments_stage(vae, *images.shape[2:]),
    ]
    engine = engine_of(stages, engine_name, folder / "bundle")
    tokens = latents.transpose(0, 2, 3, 1).reshape(batch, side * side, channels)
    image = engine.run("decode", {"latents": engine.put(tokens)})["image"]
    moments = engine.run("moments", {"images": engine.put(images)})
    outputs = {"image": image, "mean": moments["mean"], "logvar": moments["logvar"]}
    return {name: relative_error(engine.get(array), expected[name]) for name, array in outputs.items()}


def _shape(text: str) -> tuple[int, ...]:
    """The shape in a case's description of its noise, such as "noise('latents', (2, 16, 4, 4))"."""
    match = re.search(r"\(([\d, ]+)\)", text)
    if match is None:
        raise FarError(f"no shape in {text!r}; expected noise(NAME, (N, ...))")
    return tuple(int(part) for part in match[1].split(",") if part.strip())
