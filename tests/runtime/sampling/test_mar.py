"""MAR's loop, on an engine that records what it is given: which tokens each iteration sees, draws and keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from far_runtime.errors import FarError
from far_runtime.sampling import mar
from far_runtime.sampling.base import KeptRegion, Step, label_condition
from far_runtime.sampling.mar import masked_counts
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.solvers import COEFFICIENTS
from model_infos import mar_info

CHANNELS, CLASSES = 2, 5


class Recorder:
    """An engine over NumPy. Its head draws, for every token, a number that no other token of any run has."""

    def __init__(self) -> None:
        self.name = "recorder"
        self.transformer: list[dict[str, Any]] = []
        self.denoise: list[dict[str, Any]] = []
        self.drawn = 0

    def put(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def get(self, array: np.ndarray) -> np.ndarray:
        return array

    def run(
        self, stage: str, inputs: Mapping[str, Any], constants: Mapping[str, int] | None = None
    ) -> dict[str, np.ndarray]:
        assert not constants
        if stage == "transformer":
            self.transformer.append(dict(inputs))
            tokens = inputs["predicted"].shape[1]
            return {"condition": np.zeros((len(inputs["labels"]), tokens, 3), np.float32)}
        if stage == "denoise":
            self.denoise.append(dict(inputs))
            shape = inputs["state"].shape
            assert inputs["noise"].shape == shape and inputs["condition"].shape[1] == shape[1]
            values = 1 + self.drawn + np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
            self.drawn += values.size
            return {"next_state": values, "next_history": values}
        assert stage == "place"
        both = np.concatenate([inputs["latents"], inputs["sample"]], axis=1)
        return {"latents_out": np.take_along_axis(both, inputs["index"][..., None], axis=1)}

    def close(self) -> None:
        pass


def draw(
    grid: int, seeds: list[int], kept: KeptRegion | None = None, **overrides: Any
) -> tuple[Recorder, np.ndarray, list]:
    """The recorder, the final latents [B, L, C], and every step with the state that it ended with."""
    engine, states = Recorder(), []

    def on_step(step: Step, done: int, state: np.ndarray) -> None:
        if done == step.substeps:
            states.append((step, state.copy()))

    condition = label_condition(engine, [1] * len(seeds), CLASSES)
    settings = mar.resolve_settings(mar_info(grid), {"steps": 2, **overrides})
    plan = mar.plan(mar_info(grid), settings, 0 if kept is None else int(kept.keep[0].sum()))
    latents = mar.sample(engine, mar_info(grid), plan, condition, SeedNoise(seeds), on_step, kept)
    return engine, latents, states


sizes = st.integers(1, 6).flatmap(lambda grid: st.tuples(st.just(grid), st.integers(1, grid * grid)))
seeds = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3)


@given(sizes)
def test_masked_tokens_fall_at_every_iteration_and_end_at_none(size: tuple[int, int]) -> None:
    grid, iterations = size
    counts = masked_counts(grid * grid, iterations)
    assert len(counts) == iterations and counts[-1] == 0
    assert all(after < before for before, after in zip((grid * grid, *counts), counts, strict=False))


def test_masked_tokens_are_those_of_the_official_schedule() -> None:
    """sample_tokens of models/mar.py written out: the ratio, at most one less than before and at least one."""
    for iterations in (1, 2, 64, 255, 256):
        mask, lengths = 256, []
        for step in range(iterations):
            length = math.floor(256 * math.cos(math.pi / 2.0 * (step + 1) / iterations))
            mask = max(1, min(mask - 1, length))
            lengths.append(mask)
        lengths[-1] = 0  # the last iteration draws all that is left
        assert list(masked_counts(256, iterations)) == lengths
    assert masked_counts(256, 8) == (251, 236, 212, 181, 142, 97, 49, 0)


@given(sizes, seeds)
def test_every_token_is_drawn_once_and_seen_afterwards(size: tuple[int, int], seeds: list[int]) -> None:
    grid, iterations = size
    tokens, batch = grid * grid, len(seeds)
    engine, latents, states = draw(grid, seeds, iterations=iterations)
    orders = SeedNoise(seeds).orders(tokens)
    assert len(engine.transformer) == iterations == len(states)
    for row in range(batch):
        kept: list[int] = []
        for call, (_, state) in zip(engine.transformer, states, strict=True):
            visible, predicted = call["visible"][row].tolist(), call["predicted"][row].tolist()
            assert visible == sorted(kept)
            assert predicted == sorted(set(predicted)) and not set(predicted) & set(kept)
            places = [visible.index(token) if token in kept else len(visible) for token in range(tokens)]
            assert call["restore"][row].tolist() == places
            kept += predicted
            assert set(kept) == set(orders[row, tokens - len(kept) :].tolist())  # the last of the order are first
            assert sorted(np.flatnonzero(state[row].all(axis=-1)).tolist()) == sorted(kept)
        assert sorted(kept) == list(range(tokens))
        assert len(np.unique(latents[row])) == tokens * CHANNELS  # every number drawn stands in one place
    for (_, before), (_, after) in pairwise(states):
        assert (after[before != 0] == before[before != 0]).all()
    assert np.array_equal(states[-1][1], latents)


@given(sizes, seeds)
def test_a_sample_lands_at_its_tokens_in_rising_order(size: tuple[int, int], seeds: list[int]) -> None:
    grid, iterations = size
    engine, latents, _ = draw(grid, seeds, iterations=iterations, steps=1)
    first = 1
    for call in engine.transformer:
        batch, count = call["predicted"].shape
        drawn = first + np.arange(batch * count * CHANNELS, dtype=np.float32).reshape(batch, count, CHANNELS)
        first += drawn.size
        assert np.array_equal(np.take_along_axis(latents, call["predicted"][..., None], axis=1), drawn)


@given(sizes, st.floats(1.1, 10), st.sampled_from(["linear", "constant"]))
def test_guidance_rises_with_the_drawn_tokens_or_stays(size: tuple[int, int], scale: float, schedule: str) -> None:
    grid, iterations = size
    tokens = grid * grid
    overrides = {"iterations": iterations, "guidance": scale, "guidance_schedule": schedule}
    steps = mar.plan(mar_info(grid), mar.resolve_settings(mar_info(grid), overrides))
    masked = [max(count, 1) for count in masked_counts(tokens, iterations)]  # the last one counts as one, officially
    rising = [1 + (scale - 1) * (tokens - count) / tokens for count in masked]
    assert [step.guidance for step in steps] == pytest.approx(rising if schedule == "linear" else [scale] * iterations)
    assert [step.name for step in steps] == [f"iteration {i + 1}" for i in range(iterations)]
    assert [step.index for step in steps] == list(range(iterations))


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (2.5, 4)])
def test_without_guidance_there_is_no_unconditional_half(guidance: float, rows: int) -> None:
    engine, _, states = draw(4, [0, 1], iterations=5, guidance=guidance)
    assert {len(call["labels"]) for call in engine.transformer} == {rows}
    assert {len(call["condition"]) for call in engine.denoise} == {rows}
    assert {call.rows for step, _ in states for call in step.calls} == {rows // 2}
    expected = [[1, 1, CLASSES, CLASSES][:rows]] * 5
    assert [call["labels"].tolist() for call in engine.transformer] == expected


def test_diffusion_steps_may_fall_over_the_iterations() -> None:
    """DiSA's 50:5."""
    settings = mar.resolve_settings(mar_info(4), {"iterations": 10, "steps": "50:5"})
    assert settings["steps"] == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5]
    assert mar.resolve_settings(mar_info(4), {"iterations": 10, "steps": settings["steps"]}) == {**settings}
    engine, _, states = draw(4, [3], iterations=10, steps="50:5")
    assert [step.substeps for step, _ in states] == settings["steps"]
    assert [step.calls[1].times for step, _ in states] == settings["steps"]
    assert len(engine.denoise) == sum(settings["steps"])
    assert mar.resolve_settings(mar_info(4), {"iterations": 1, "steps": "50:5"})["steps"] == 50


def test_temperature_is_the_factor_of_the_noise_at_every_iteration() -> None:
    engine, _, _ = draw(3, [3], iterations=4, steps=3, temperature=0.7)
    factors = [float(call["coefficients"][COEFFICIENTS.index("noise")]) for call in engine.denoise]
    assert factors == pytest.approx([0.7, 0.7, 0.0] * 4)


def test_the_official_settings_are_the_defaults() -> None:
    expected = {"iterations": 64, "steps": 100, "guidance": 2.9, "guidance_schedule": "linear", "temperature": 1.0}
    assert mar.resolve_settings(mar_info(16), {}) == expected | {"solver": "ddpm", "start": None, "guidance_floor": 1.0}
    assert mar.resolve_settings(mar_info(4), {})["iterations"] == 16  # as many as there are tokens


@given(sizes, seeds, st.data())
def test_kept_tokens_are_seen_from_the_start_and_never_drawn(
    size: tuple[int, int], seeds: list[int], data: st.DataObject
) -> None:
    grid, iterations = size
    tokens, batch = grid * grid, len(seeds)
    cells = data.draw(st.sets(st.integers(0, tokens - 1), max_size=tokens))
    keep = np.isin(np.arange(tokens), sorted(cells)).reshape(1, grid, grid).repeat(batch, axis=0)
    latents_before = -1 - np.arange(batch * tokens * CHANNELS, dtype=np.float32).reshape(batch, tokens, CHANNELS)
    engine, latents, _ = draw(grid, seeds, KeptRegion(latents_before, keep), iterations=iterations)
    drawn = [call["predicted"] for call in engine.transformer]
    assert len(drawn) == min(iterations, tokens - len(cells))
    for row in range(batch):
        places = sorted(token for predicted in drawn for token in predicted[row].tolist())
        assert places == sorted(set(range(tokens)) - cells)
        assert all(set(call["visible"][row].tolist()) >= cells for call in engine.transformer)
    kept = keep.reshape(batch, tokens)
    assert np.array_equal(latents[kept], latents_before[kept]) and (latents[~kept] > 0).all()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            {"iterations": 0},
            "iterations 0: expected a whole number from 1 to 16, the tokens of a picture; use iterations 16, say",
        ),
        ({"iterations": 17}, "iterations 17: expected a whole number from 1 to 16"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule cosine: expected linear or constant"),
        ({"guidance": -1.0}, r"guidance -1\.0: expected a number of 0 or more; use guidance 2\.9, say"),
        ({"temperature": float("nan")}, "temperature nan: expected a number of 0 or more"),
        ({"iterations": 4, "steps": "1,2"}, "steps names 2 iterations, the schedule has 4"),
        ({"iterations": 4, "steps": "5:0"}, "steps 5:0: 0 diffusion steps; expected 1 to 1000"),
    ],
)
def test_settings_that_cannot_be(overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(FarError, match=reason):
        mar.resolve_settings(mar_info(4), overrides)
