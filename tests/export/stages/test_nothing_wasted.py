"""What the Pipeline leaves out changes no picture: it draws what a plain, wasteful loop over the networks draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from far_export.load import load_pair
from far_models.far import restore_indices
from far_runtime.bundle import open_bundle
from far_runtime.conditioning.text import encode
from far_runtime.engines import open_engine
from far_runtime.engines.base import EngineOptions
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.lowpass import lowpass
from far_runtime.sampling.mar import masked_counts
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.noise_schedule import cosine_alphas_cumprod

if TYPE_CHECKING:
    from conftest import Tiny

LABELS, SEEDS = (3, 1, 3), (4, 5, 6)
STEPS, GUIDANCE = 4, 2.5


def reverse_diffusion(
    model: nn.Module, prediction: str, z: Tensor, level: int | None, guidance: float, temperature: float,
    start: NDArray[np.float32], noise: Callable[[int], NDArray[np.float32]],
) -> Tensor:  # fmt: skip
    """The official p_sample_loop: both halves at every call, with every row's own timestep and level embedded anew."""
    kept = cosine_alphas_cumprod()[[round(i * 999 / (STEPS - 1)) for i in range(STEPS)]]
    before = np.append(1.0, kept[:-1])
    betas, timesteps = 1 - kept / before, [round(i * 999 / (STEPS - 1)) for i in range(STEPS)]
    variance = betas * (1 - before) / (1 - kept)
    variance[0] = variance[1]
    head: Any = model.diffloss.net
    x = torch.from_numpy(start).repeat(2, 1, 1)
    half = len(start)
    for draw, i in enumerate(reversed(range(STEPS))):
        rows = torch.full(x.shape[:2], float(timesteps[i]))
        levels = None if level is None else torch.full((*x.shape[:2], 1), float(level))
        out = head(x, rows, head.condition(z, levels))
        value, fraction = out[..., : x.shape[-1]], (out[:half, :, x.shape[-1] :].double() + 1) / 2
        value = value[half:] + guidance * (value[:half] - value[half:])
        state, value = x[:half].double(), value.double()
        if prediction == "epsilon":
            x0 = state / math.sqrt(kept[i]) - math.sqrt(1 / kept[i] - 1) * value
        else:
            x0 = math.sqrt(kept[i]) * state - math.sqrt(1 - kept[i]) * value
        mean = betas[i] * math.sqrt(before[i]) / (1 - kept[i]) * x0
        mean = mean + (1 - before[i]) * math.sqrt(1 - betas[i]) / (1 - kept[i]) * state
        if i > 0:
            log_variance = fraction * math.log(betas[i]) + (1 - fraction) * math.log(variance[i])
            drawn = torch.from_numpy(noise(draw)).double() * temperature
            mean = mean + torch.exp(0.5 * log_variance) * drawn
        x = mean.float().repeat(2, 1, 1)
    return x[:half]


def plain_far(
    model: Any, embedding: Tensor, text: bool, levels: Sequence[int], prediction: str = "v"
) -> NDArray[np.float32]:
    """FAR's loop: sample_tokens_nomask and sample_tokens_mask, and FAR-T2I's. embedding: both halves' condition."""
    config, noise, n = model.config, SeedNoise(SEEDS), len(levels)
    masked, tokens = text or config.masked, config.grid**2
    orders = torch.from_numpy(noise.orders(tokens)) if masked else None
    latents = np.zeros((len(SEEDS), tokens, config.channels), np.float32)
    for i, level in enumerate(levels):
        guidance = GUIDANCE if text else 1 + (GUIDANCE - 1) * i / n
        unfiltered = masked and not text and i <= 1
        seen = torch.from_numpy(latents if unfiltered else lowpass(latents, level)).float().repeat(2, 1, 1)
        temperature = 0.8 + 0.2 * (1 - math.cos(math.pi / 2 * (i + 1) / n))
        if masked and not text:
            temperature = 0.85 + 0.15 * i / n
        if orders is None:
            z = model.features(seen, embedding)
        else:
            count = tokens - math.floor(tokens * math.cos(math.pi / 2 * i / n))
            visible = orders[:, tokens - count :].sort(dim=1).values.repeat(2, 1)
            nothing = text and count == 0
            restore = None if nothing else restore_indices(visible, tokens)
            z = model.features(None if nothing else seen, embedding, None if nothing else visible, restore)
        start = noise.start(i, tokens, config.channels)
        latents = reverse_diffusion(
            model, prediction, z, level, guidance, temperature, start,
            lambda draw, i=i: noise.diffusion(i, draw, tokens, config.channels),
        ).numpy()  # fmt: skip
    return latents


def plain_mar(model: Any, embedding: Tensor, iterations: int) -> NDArray[np.float32]:
    """MAR's loop (sample_tokens)."""
    config, noise = model.config, SeedNoise(SEEDS)
    tokens = config.grid**2
    orders = torch.from_numpy(noise.orders(tokens))
    latents, before = torch.zeros(len(SEEDS), tokens, config.channels), tokens
    for i, masked in enumerate(masked_counts(tokens, iterations)):
        visible = orders[:, before:].sort(dim=1).values.repeat(2, 1)
        predicted = orders[:, masked:before].sort(dim=1).values
        z = model.features(latents.repeat(2, 1, 1), embedding, visible, restore_indices(visible, tokens))
        z = torch.stack([row[places] for row, places in zip(z, predicted.repeat(2, 1), strict=True)])
        guidance = 1 + (GUIDANCE - 1) * (tokens - max(masked, 1)) / tokens
        drawn = before - masked
        sample = reverse_diffusion(
            model, config.prediction, z, None, guidance, 1.0, noise.start(i, drawn, config.channels),
            lambda draw, i=i, drawn=drawn: noise.diffusion(i, draw, drawn, config.channels),
        )  # fmt: skip
        for row, places, found in zip(latents, predicted, sample, strict=True):
            row[places] = found
        before = masked
    return latents.numpy()


def both_halves(model: Any) -> Tensor:
    """Class embeddings of the pictures, then the null class's."""
    labels = [*LABELS, *[model.config.classes] * len(LABELS)]
    return model.class_embedding(torch.tensor(labels))


ROWS = {"transformer": "labels", "denoise": "condition", "decode": "latents"}
"""By stage, an input that has a row for every one that is computed."""


class Counting:
    """An engine that counts runs and rows of stages."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.name = engine, engine.name
        self.put, self.get, self.close = engine.put, engine.get, engine.close
        self.runs: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()

    def clear(self) -> None:
        self.runs.clear()
        self.rows.clear()

    def run(self, stage: str, inputs: Any, constants: Any = None) -> dict[str, Any]:
        self.runs[stage] += 1
        self.rows[stage] += len(self.get(inputs[ROWS[stage]]))
        return self.engine.run(stage, inputs, constants)  # type: ignore[no-any-return]


def relative_error(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


@pytest.fixture(params=["onnxruntime", "openvino"])
def draw(request: pytest.FixtureRequest) -> Any:
    """Draws twice, first with an empty memory and then with a full one; both times the same bits."""
    pytest.importorskip(request.param)

    def draw(path: Any, subjects: Sequence[Any], **settings: Any) -> NDArray[np.float32]:
        with Pipeline.from_bundle(path, request.param, threads=1) as pipeline:
            first, again = (
                pipeline.generate(subjects, SEEDS, steps=STEPS, guidance=GUIDANCE, **settings) for _ in range(2)
            )
        assert np.array_equal(first.latents, again.latents)
        return first.latents

    return draw


@torch.no_grad()
def test_far_equals_the_plain_loop(tiny: Tiny, draw: Any) -> None:
    model: Any = load_pair(tiny.safetensors, tiny.vae)[0].model
    plain = plain_far(model, both_halves(model), False, [0, 1, 2, 3])
    assert relative_error(draw(tiny.bundle, LABELS), plain) < 1e-5


@torch.no_grad()
def test_masked_far_equals_the_plain_loop(tiny: Tiny, draw: Any) -> None:
    model: Any = load_pair(tiny.masked, tiny.vae)[0].model
    plain = plain_far(model, both_halves(model), False, [0, 2])
    assert relative_error(draw(tiny.masked_bundle, LABELS), plain) < 1e-5


@torch.no_grad()
def test_mar_equals_the_plain_loop(tiny: Tiny, draw: Any) -> None:
    model: Any = load_pair(tiny.mar, tiny.vae)[0].model
    plain = plain_mar(model, both_halves(model), 4)
    assert relative_error(draw(tiny.mar_bundle, LABELS), plain) < 1e-5


PROMPTS, NEGATIVE = ("a red apple", "green lion", "a red apple"), "the city"


@torch.no_grad()
def test_text_to_image_equals_the_plain_loop(tiny: Tiny, draw: Any) -> None:
    bundle = open_bundle(tiny.t2i_bundle)
    engine = open_engine(bundle, "onnxruntime", EngineOptions(threads=1))
    found, _ = encode(engine, bundle.manifest, bundle.path, [*PROMPTS, NEGATIVE])
    features = torch.from_numpy(engine.get(found).copy())[[0, 1, 2, 3, 3, 3]]
    model: Any = load_pair(tiny.t2i, tiny.vae)[0].model
    plain = plain_far(
        model, model.context(features, torch.zeros(6)), True, [0, 1, 2, 3], bundle.manifest.model.prediction
    )
    assert relative_error(draw(tiny.t2i_bundle, PROMPTS, negative=NEGATIVE), plain) < 1e-5


def test_what_is_left_out(tiny: Tiny) -> None:
    """Per picture and level: no unconditional half where the scale is 1, no transformer for a first level whose class
    was drawn before, and nothing that depends on the level alone at every diffusion step."""
    with Pipeline.from_bundle(tiny.bundle, "onnxruntime", threads=1) as opened:
        counting = Counting(opened.engine)
        pipeline = Pipeline(opened.bundle, counting)
        pipeline.generate([1, 2, 1], SEEDS, steps=STEPS)
        assert counting.runs == {"transformer": 2 + 3, "denoise": 4 * STEPS, "decode": 1}
        assert counting.rows == {"transformer": 2 + 3 * 6, "denoise": (3 + 3 * 6) * STEPS, "decode": 3}
        counting.clear()
        pipeline.generate([1, 2, 1], SEEDS, steps=STEPS)
        assert counting.runs == {"transformer": 3, "denoise": 4 * STEPS, "decode": 1}
        counting.clear()
        pipeline.generate([1, 2, 1], SEEDS, steps=STEPS, guidance=1.0)
        assert counting.rows == {"transformer": 3 * 3, "denoise": 4 * 3 * STEPS, "decode": 3}
        counting.clear()
        Pipeline(opened.bundle, counting, cache_bytes=0).generate([1, 2, 1], SEEDS, steps=STEPS)
        assert counting.rows == {"transformer": 3 + 3 * 6, "denoise": (3 + 3 * 6) * STEPS, "decode": 3}
