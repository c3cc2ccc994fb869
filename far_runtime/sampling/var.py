"""VAR's sampling loop: token map after token map, coarse to fine (VAR section 3.2; autoregressive_infer_cfg in the
official models/var.py), and its zero-shot editing (demo_zero_shot_edit.ipynb there)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.engines.base import Array, Engine, scalar
from far_runtime.model_info import VarInfo
from far_runtime.sampling.base import Call, Condition, KeptRegion, OnStep, Plan, Step, TokenChoice
from far_runtime.sampling.noise import NoiseSource
from far_runtime.sampling.options import resolve_values
from far_runtime.sampling.pyramid import kept_tokens, phi_index, progress, token_ranges

PRESETS: Mapping[str, Mapping[str, Any]] = {}
"""VAR has no diffusion steps to save."""


def resolve_settings(model: VarInfo, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All settings as JSON values; FarError for values that cannot be.

    guidance: rises from 0 at the first scale to this at the last; 0 is none. top_k 1: always the likeliest token.
    """
    return resolve_values("var", model, overrides)


def plan(model: VarInfo, settings: Mapping[str, Any], kept: int = 0) -> Plan:
    """One step for every scale; `kept` changes nothing.

    The guidance of a step is 1 + guidance * progress. At the first scale it is 1: there the unconditional half gives
    keys and values for the later scales, but no logits.
    """
    scales = model.patch_nums
    choice = TokenChoice(settings["top_k"], settings["top_p"], settings["more_smooth"])
    rows = 2 if settings["guidance"] else 1
    steps, past = [], 0
    for i, side in enumerate(scales):
        tokens = side * side
        guidance = 1 + settings["guidance"] * progress(i, len(scales))
        after = scales[i + 1] ** 2 if i + 1 < len(scales) else 0
        constants = {"phi": phi_index(i, len(scales), model.phis)}
        calls = [
            Call("transformer", rows=rows, sizes={"tokens": tokens, "past": past}),
            Call("logits", rows=1 if guidance == 1 else 2, sizes={"tokens": tokens}),
            Call("smooth" if choice.more_smooth else "choose", sizes={"tokens": tokens}),
            Call("quantize", constants=constants, sizes={"tokens": tokens, "after": after}),
        ]
        if i == 0:
            calls.insert(0, Call("condition", rows=rows))
        steps.append(
            Step(
                index=i,
                kind="scale",
                number=side,
                substeps=1,
                guidance=guidance,
                constants=constants,
                calls=tuple(calls),
                tokens=tokens,
                choice=choice,
            )
        )
        past += tokens
    return tuple(steps)


def sample(
    engine: Engine,
    model: VarInfo,
    plan: Plan,
    condition: Condition,
    noise: NoiseSource,
    on_step: OnStep | None = None,
    kept: KeptRegion | None = None,
) -> Array:
    """The feature map [B, L, C] (on the engine's device) that the decode stage takes.

    The latents of `kept` are the encoder's features [B, L, C]. Where the mask, resized to a scale, keeps a token, the
    embedding of the edited picture replaces the drawn one; a scale of one token is always kept.
    """
    scales, batch = model.patch_nums, condition.batch
    copies = plan[0].calls[0].rows
    latents = engine.put(np.zeros((batch, scales[-1] ** 2, model.channels), np.float32))
    pictures = np.arange(batch)
    once, repeated = engine.put(pictures), engine.put(np.tile(pictures, copies))
    fixed = engine.run("condition", condition.cond if copies == 1 else condition.cond_uncond)
    x, cache = fixed["x"], empty_cache(engine, model, batch * copies)
    ranges = [*token_ranges(scales), (0, 0)]
    embedded = None if kept is None else engine.run("tokenize", {"latents": kept.latents})["embeddings"]
    for step in plan:
        start, end = ranges[step.index]
        out = engine.run("transformer", {"x": x, "modulation": fixed["modulation"], **cache})
        cache = {name: out[f"next_{name}"] for name in cache}
        hidden = {"hidden": out["hidden"], "head_modulation": fixed["head_modulation"], "pictures": once}
        logits = guided_logits(engine, step, batch, hidden)
        gumbel = engine.put(noise.gumbel(step.index, end - start, model.vocabulary))
        embeddings = choose(engine, model, step, logits, gumbel)
        if kept is not None:
            index = engine.put(kept_index(kept.keep, scales, step.index))
            placed = engine.run("place", {"latents": embedded, "sample": embeddings, "index": index})
            embeddings = placed["latents_out"]
        inputs = {
            "embeddings": embeddings,
            "latents": latents,
            "here": engine.put(np.arange(start, end)),
            "after": engine.put(np.arange(*ranges[step.index + 1])),
            "pictures": repeated,
        }
        out = engine.run("quantize", inputs, step.constants)
        latents, x = out["next_latents"], out["x"]
        if on_step is not None:
            on_step(step, 1, latents)
    return latents


def guided_logits(engine: Engine, step: Step, batch: int, hidden: Mapping[str, Array]) -> Array:
    """Logits [B, T, V] of one scale, from the transformer's output and the other inputs of the logits stage."""
    inputs = {
        **hidden,
        "picked": engine.put(np.arange(batch if step.guidance == 1 else 2 * batch)),
        "guidance": engine.put(step.guidance_scales(batch)),
    }
    return engine.run("logits", inputs)["logits"]


def choose(engine: Engine, model: VarInfo, step: Step, logits: Array, noise: Array) -> Array:
    """Embeddings [B, T, C] of tokens drawn from logits [B, T, V] with Gumbel noise [B, T, V].

    With more_smooth each is mixed from the embeddings of several tokens.
    """
    assert step.choice is not None  # every scale draws tokens
    top_k, top_p = step.choice.top_k, step.choice.top_p
    inputs = {
        "logits": logits,
        "noise": noise,
        "cut": engine.put(scalar(model.vocabulary - top_k if top_k else 0, np.int64)),
        "tail": engine.put(scalar(1 - top_p if top_p else -1)),
    }
    if not step.choice.more_smooth:
        return engine.run("choose", inputs)["embeddings"]
    ratio = progress(step.index, len(model.patch_nums))
    inputs["gain"] = engine.put(scalar(1 + ratio))
    inputs["sharpness"] = engine.put(scalar(1 / max(0.27 * (1 - ratio * 0.95), 0.005)))
    return engine.run("smooth", inputs)["embeddings"]


def cache_names(depth: int) -> list[tuple[str, str]]:
    """Names of every block's keys and values as inputs of the transformer; its outputs have "next_" before them."""
    return [(f"key_{i:02d}", f"value_{i:02d}") for i in range(depth)]


def empty_cache(engine: Engine, model: VarInfo, rows: int) -> dict[str, Array]:
    """The keys and values of all blocks before the first scale: arrays [rows, heads, 0, width / heads]."""
    empty = engine.put(np.zeros((rows, model.heads, 0, model.width // model.heads), np.float32))
    return {name: empty for pair in cache_names(model.depth) for name in pair}


def kept_index(keep: NDArray[np.bool_], scales: Sequence[int], scale: int) -> NDArray[np.int64]:
    """The place stage's index [B, T] at scale number `scale`, for cells [B, h, w] that are kept.

    Kept tokens are taken from the edited picture's tokens of all scales, the others from the drawn tokens behind them.
    """
    start, end = token_ranges(scales)[scale]
    places = np.arange(end - start)
    total = sum(side * side for side in scales)
    return np.where(kept_tokens(keep, scales[scale]), start + places, total + places)


def preview_latents(model: VarInfo, plan: Plan, samples: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """The feature maps after each scale."""
    return list(samples)
