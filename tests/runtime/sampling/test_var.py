"""VAR's loop: its plan, seeds, guidance and editing, over the torch modules of a tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from far_runtime.errors import FarError
from far_runtime.model_info import VarInfo
from far_runtime.sampling import var as loop
from far_runtime.sampling.base import KeptRegion, Step, label_condition, merge_guidance
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.options import settings_of
from far_runtime.sampling.pyramid import SCALES_256, SCALES_512, kept_tokens, token_ranges
from model_infos import var_info

OFFICIAL = var_info()
DEFAULTS = {"guidance": 1.5, "top_k": 900, "top_p": 0.96, "more_smooth": False}


@dataclass
class Recorder:
    """An engine that passes everything on and keeps the inputs of every call."""

    engine: Any
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.engine.name
        self.put, self.get, self.close = self.engine.put, self.engine.get, self.engine.close

    def run(self, stage: str, inputs: Mapping[str, Any], constants: Mapping[str, int] | None = None) -> dict[str, Any]:
        self.calls.append((stage, dict(inputs)))
        out: dict[str, Any] = self.engine.run(stage, inputs, constants)
        return out

    def inputs(self, stage: str, name: str) -> list[Any]:
        """An input of every call of a stage."""
        return [self.get(inputs[name]) for of, inputs in self.calls if of == stage]


@dataclass(frozen=True)
class Tiny:
    """Engine and manifest entry of a tiny model over 1, 2 and 4 cells a side, and its codes [24, 4]."""

    engine: Any
    model: VarInfo
    codes: Any
    states: Any


@pytest.fixture(scope="module")
def tiny_var() -> Iterator[Tiny]:
    import torch

    from far_export.stages.var import stages
    from far_export.stages.var import var_info as info_of
    from far_export.stages.var_editing import editing_stages
    from far_export.torch_engine import TorchEngine
    from far_models.var import VAR, VARConfig
    from far_models.vq_vae import VQVAE, VQVAEConfig

    torch.manual_seed(0)
    scales = (1, 2, 4)
    var = VAR(VARConfig(scales, channels=4, vocabulary=24, classes=5, width=16, depth=2, heads=2))
    vqvae = VQVAE(VQVAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=4, vocabulary=24, patch_nums=scales))
    for parameter in var.requires_grad_(False).parameters():
        parameter.normal_(std=0.3)
    vqvae.requires_grad_(False)

    def states(tokens: Any) -> list[Any]:
        return [state.numpy() for state in vqvae.quantize.states(torch.from_numpy(tokens))]

    engine = TorchEngine([*stages(var, vqvae), *editing_stages(var, vqvae)])
    yield Tiny(engine, info_of(var, vqvae), vqvae.quantize.embedding.weight.numpy(), states)
    engine.close()


def draw(tiny: Tiny, seeds: list[int], labels: list[int] | None = None, **options: Any) -> tuple[Any, Recorder]:
    """Feature maps [B, 16, 4], and what was run."""
    kept, each = options.pop("kept", None), options.pop("each", None)
    recorder = Recorder(tiny.engine)
    settings = loop.resolve_settings(tiny.model, options)
    scales = each or [settings["guidance"]]
    plan = merge_guidance([loop.plan(tiny.model, {**settings, "guidance": scale}) for scale in scales])
    condition = label_condition(recorder, labels or [1] * len(seeds), tiny.model.classes)
    state = loop.sample(recorder, tiny.model, plan, condition, SeedNoise(seeds), kept=kept)
    return recorder.get(state), recorder


def test_pictures_of_a_batch_are_guided_each_by_its_own_scale(tiny_var: Tiny) -> None:
    scales = (3.0, 0.0, 1.5)
    batch, recorder = draw(tiny_var, [4, 5, 6], [1, 2, 3], each=scales)
    for i, scale in enumerate(scales):
        alone, _ = draw(tiny_var, [4 + i], [1 + i], guidance=scale)
        np.testing.assert_allclose(batch[i], alone[0], rtol=0, atol=1e-4)
    assert [list(scale) for scale in recorder.inputs("logits", "guidance")] == [
        [1, 1, 1], [2.5, 1, 1.75], [4, 1, 2.5],
    ]  # fmt: skip


def test_official_settings_are_the_default() -> None:
    assert loop.resolve_settings(OFFICIAL, {}) == DEFAULTS
    assert loop.resolve_settings(var_info(64), {})["top_k"] == 64
    assert tuple(DEFAULTS) == settings_of("var")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance": -1.0}, r"guidance -1\.0: expected a number of 0 or more; use guidance 1\.5, say"),
        ({"guidance": float("nan")}, "guidance nan"),
        (
            {"top_k": 4097},
            "top_k 4097: expected a whole number from 0 to 4096, the tokens of the vocabulary; use top_k 900",
        ),
        ({"top_k": 0.5}, "top_k 0.5: expected a whole number"),
        ({"top_p": 1.01}, r"top_p 1\.01: expected a number from 0 to 1; use top_p 0\.96, say"),
        ({"more_smooth": "yes"}, "more_smooth yes: expected true or false"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FarError, match=message):
        loop.resolve_settings(OFFICIAL, given)


def test_plan_of_the_official_model() -> None:
    plan = loop.plan(OFFICIAL, DEFAULTS)
    assert [step.number for step in plan] == list(SCALES_256)
    assert [step.constants["phi"] for step in plan] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert np.allclose([step.guidance for step in plan], 1 + 1.5 * np.arange(10) / 9)
    assert [call.stage for call in plan[0].calls] == ["condition", "transformer", "logits", "choose", "quantize"]
    assert [call.rows for call in plan[0].calls] == [2, 2, 1, 1, 1]
    assert [call.rows for call in plan[1].calls] == [2, 2, 1, 1]
    assert dict(plan[-1].calls[0].sizes) == {"tokens": 256, "past": 424}
    assert dict(plan[-1].calls[-1].sizes) == {"tokens": 256, "after": 0}
    unguided = loop.plan(OFFICIAL, {**DEFAULTS, "guidance": 0.0, "more_smooth": True})
    assert {call.rows for step in unguided for call in step.calls} == {1}
    assert unguided[3].calls[2].stage == "smooth"


def test_a_seed_gives_the_same_picture_in_any_batch(tiny_var: Tiny) -> None:
    batch, _ = draw(tiny_var, [3, 4, 3], [1, 2, 1])
    alone, _ = draw(tiny_var, [4], [2])
    np.testing.assert_allclose(batch[1], alone[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(batch[0], batch[2], rtol=0, atol=1e-5)
    assert np.abs(batch[0] - batch[1]).max() > 0.1


def test_the_first_scale_has_no_unconditional_logits_but_keys(tiny_var: Tiny) -> None:
    _, recorder = draw(tiny_var, [1, 2])
    assert [len(rows) for rows in recorder.inputs("logits", "picked")] == [2, 4, 4]
    assert [x.shape[:2] for x in recorder.inputs("transformer", "x")] == [(4, 1), (4, 4), (4, 16)]
    assert [key.shape[2] for key in recorder.inputs("transformer", "key_01")] == [0, 1, 5]
    assert [of for of, _ in recorder.calls].count("condition") == 1
    _, recorder = draw(tiny_var, [1, 2], guidance=0)
    assert [x.shape[0] for x in recorder.inputs("transformer", "x")] == [2, 2, 2]


def test_guidance_of_nothing_is_guidance_towards_nothing(tiny_var: Tiny) -> None:
    """Rows of the null class twice: the guided logits are the unguided ones."""
    guided, _ = draw(tiny_var, [1], [5], guidance=4.0)
    plain, _ = draw(tiny_var, [1], [5], guidance=0)
    np.testing.assert_allclose(guided, plain, rtol=0, atol=1e-5)
    one, _ = draw(tiny_var, [1], [2], guidance=4.0)
    other, _ = draw(tiny_var, [1], [2], guidance=0)
    assert np.abs(one - other).max() > 0.1


def test_one_candidate_leaves_nothing_to_chance(tiny_var: Tiny) -> None:
    first, _ = draw(tiny_var, [1], top_k=1)
    second, _ = draw(tiny_var, [2], top_k=1)
    assert np.array_equal(first, second)
    mixed, _ = draw(tiny_var, [3], top_k=1, more_smooth=True)
    np.testing.assert_allclose(mixed, first, rtol=0, atol=1e-5)


def test_the_state_after_each_scale_is_reported(tiny_var: Tiny) -> None:
    seen: list[tuple[Step, int, Any]] = []
    plan = loop.plan(tiny_var.model, loop.resolve_settings(tiny_var.model, {}))
    condition = label_condition(tiny_var.engine, [1], 5)
    state = loop.sample(
        tiny_var.engine, tiny_var.model, plan, condition, SeedNoise([1]),
        lambda step, done, state: seen.append((step, done, state.numpy().copy())),
    )  # fmt: skip
    assert [(step.name, done) for step, done, _ in seen] == [("scale 1", 1), ("scale 2", 1), ("scale 4", 1)]
    samples = [state for _, _, state in seen]
    assert np.array_equal(samples[-1], state.numpy())
    assert loop.preview_latents(tiny_var.model, plan, samples) == samples


def encoded(tiny: Tiny, batch: int) -> Any:
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 8, 8, 3)).astype(np.uint8)
    return tiny.engine.run("encode", {"pixels": tiny.engine.put(pixels)})["latents"]


def test_an_edit_keeps_the_picture_s_tokens_where_the_mask_says(tiny_var: Tiny) -> None:
    keep = np.zeros((2, 4, 4), bool)
    keep[0, :, :2] = True
    latents = encoded(tiny_var, 2)
    own = tiny_var.engine.run("tokenize", {"latents": latents})["embeddings"].numpy()
    free, _ = draw(tiny_var, [1, 2])
    edited, recorder = draw(tiny_var, [1, 2], kept=KeptRegion(latents, keep))
    used = recorder.inputs("quantize", "embeddings")
    drawn = recorder.inputs("place", "sample")
    for side, (start, end), got, sampled in zip((1, 2, 4), token_ranges((1, 2, 4)), used, drawn, strict=True):
        kept = kept_tokens(keep, side)
        assert np.array_equal(got, np.where(kept[..., None], own[:, start:end], sampled))
        assert kept.sum() == {1: 2, 2: 2, 4: 8}[side]
    assert np.abs(edited - free).max() > 0.1


def test_an_edit_that_keeps_all_is_the_picture_s_reconstruction(tiny_var: Tiny) -> None:
    latents = encoded(tiny_var, 1)
    edited, _ = draw(tiny_var, [1], kept=KeptRegion(latents, np.ones((1, 4, 4), bool)))
    own = tiny_var.engine.run("tokenize", {"latents": latents})["embeddings"].numpy()
    tokens = np.square(own[:, :, None] - tiny_var.codes).sum(-1).argmin(-1)
    np.testing.assert_allclose(edited, tiny_var.states(tokens)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scales", [SCALES_256, SCALES_512])
def test_masks_are_resized_as_the_official_notebook_does(scales: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    last = scales[-1]
    rng = np.random.default_rng(0)
    masks = rng.random((6, last, last)) > rng.random((6, 1, 1))
    masks[0] = False
    masks[0, last // 8 : last // 2, last // 4 :] = True
    for side in scales:
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(masks).float()[:, None], size=(side, side), mode="bilinear", align_corners=False
        )
        expected = resized.gt(0.5).flatten(1).numpy() | (side == 1)
        assert np.array_equal(kept_tokens(masks, side), expected), side
