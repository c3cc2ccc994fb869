"""Golden cases of VAR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from far_export.stages.var import stages, var_info
from far_models.checkpoint.load import load_checkpoint
from far_runtime.engines.base import Engine
from far_runtime.sampling import var as loop
from far_runtime.sampling.base import label_condition
from golden.draws import relative_error, stream, weight
from golden.stage_engine import engine_of

NEAREST = np.float32(1e-7)


class NamedGumbel:
    """The Gumbel noise of a golden case, by the number of the scale."""

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def gumbel(self, step: int, tokens: int, vocabulary: int) -> NDArray[np.float32]:
        drawn = stream(f"gumbel_{step:02d}", self.seed).random_sample((self.batch, tokens, vocabulary))
        uniform = np.clip(drawn.astype(np.float32), NEAREST, 1 - NEAREST)
        return -np.log(-np.log(uniform))


class Recorder:
    """An engine that keeps every scale's logits and tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name = engine, engine.name
        self.logits: list[NDArray[Any]] = []
        self.tokens: list[NDArray[Any]] = []
        self.put, self.get, self.close = engine.put, engine.get, engine.close

    def run(self, stage: str, inputs: Any, constants: Any = None) -> dict[str, Any]:
        outputs = self.engine.run(stage, inputs, constants)
        for name, arrays in (("logits", self.logits), ("tokens", self.tokens)):
            if name in outputs:
                arrays.append(self.get(outputs[name]).copy())
        return outputs


def save_state(case: dict[str, Any], prefix: str, path: Path) -> None:
    """Save the parameters under a prefix as a flat state dict, with the buffers that the official modules save."""
    names = [name for name in case["parameters"] if name.startswith(prefix)]
    state = {
        name[len(prefix) :]: torch.from_numpy(weight(name, tuple(case["parameters"][name]), case["seed"]))
        for name in names
    }
    scales = case["patch_nums"]
    tokens = sum(side * side for side in scales)
    if prefix == "var.":
        state["lvl_1L"] = torch.repeat_interleave(torch.arange(len(scales)), torch.tensor([s * s for s in scales]))[
            None
        ]
        state["attn_bias_for_masking"] = torch.full((1, 1, tokens, tokens), -torch.inf).triu(1)
        for i in range(case["depth"]):
            state[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros(case["width"])
    else:
        state["quantize.ema_vocab_hit_SV"] = torch.zeros(len(scales), len(state["quantize.embedding.weight"]))
    torch.save(state, path)


def check_var(
    case: dict[str, Any], expected: dict[str, NDArray[Any]], engine_name: str, folder: Path
) -> dict[str, float]:
    """Relative errors of guided logits, final feature map and image, and the shares of wrong tokens (indices_*)."""
    save_state(case, "var.", folder / "var.pth")
    save_state(case, "vae.", folder / "vae.pth")
    overrides = {"heads": case["heads"], "patch_nums": case["patch_nums"]}
    var = load_checkpoint(folder / "var.pth", overrides=overrides, expect="var").model
    vqvae = load_checkpoint(folder / "vae.pth", expect="vqvae").model
    model = var_info(var, vqvae)
    names = {"guidance": "cfg", "top_k": "top_k", "top_p": "top_p", "more_smooth": "more_smooth"}
    settings = loop.resolve_settings(model, {ours: case[theirs] for ours, theirs in names.items() if theirs in case})
    engine = Recorder(engine_of(stages(var, vqvae, pixels=False), engine_name, folder / "bundle"))
    condition = label_condition(engine, case["labels"], model.classes)
    noise: Any = NamedGumbel(condition.batch, case["seed"])
    latents = loop.sample(engine, model, loop.plan(model, settings), condition, noise)
    image = np.clip(engine.get(engine.run("decode", {"latents": latents})["image"]), -1, 1) / 2 + 0.5
    cells = engine.get(latents).transpose(0, 2, 1)
    errors = {}
    for i, logits in enumerate(engine.logits):
        kept = logits[:, :: max(1, logits.shape[1] // 8), ::64]
        errors[f"logits_{i}"] = relative_error(kept, expected[f"logits_{i}"])
    for i, tokens in enumerate(engine.tokens):
        errors[f"indices_{i}"] = float(np.mean(tokens != expected[f"indices_{i}"]))
    return {
        **errors,
        "fhat": relative_error(cells.reshape(expected["fhat"].shape), expected["fhat"]),
        "image": relative_error(image[:, :, ::4, ::4], expected["image"]),
    }
