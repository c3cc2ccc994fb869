"""FAR-T2I's stages: the loop draws the same over any form of its graphs, and every engine can take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from far_export.stages import far, far_t2i
from far_export.stages.flops import count_flops
from far_export.stages.stage import Stage
from far_export.torch_engine import TorchEngine
from far_models.checkpoint.load import load_checkpoint
from far_models.far_t2i import FART2I
from far_runtime.bundle import Graph, open_bundle
from far_runtime.conditioning.text import context_condition
from far_runtime.sampling import far_t2i as loop
from far_runtime.sampling.base import KeptRegion, merge_guidance
from far_runtime.sampling.flops import row_flops
from far_runtime.sampling.lowpass import lowpass
from far_runtime.sampling.noise import SeedNoise
from model_infos import far_t2i_info

INFO = far_t2i_info(4)
SETTINGS = {"levels": [0, 1, 3], "steps": 2, "guidance": 2.0, "temperature": 1.0}


@pytest.fixture(scope="module")
def model(tiny: Any) -> FART2I:
    return load_checkpoint(tiny.t2i).model


def draw(model: FART2I, stages: Sequence[Stage], settings: dict[str, Any], kept: KeptRegion | None = None) -> Any:
    engine = TorchEngine(stages)
    features = np.random.default_rng(0).standard_normal((2, 8, 12)).astype(np.float32)
    condition = context_condition(engine, engine.put(features), [0, 1], [None, 0])
    return engine.get(loop.sample(engine, INFO, loop.plan(INFO, settings), condition, SeedNoise([1, 2]), None, kept))


def test_a_graph_a_step_draws_what_the_shared_graphs_draw(model: FART2I) -> None:
    folded = far_t2i.stages(model, loop.plan(INFO, SETTINGS))
    assert [stage.name for stage in folded] == [
        "context", "transformer_00_level00", "transformer_01_level01", "transformer_02_level03", "denoise",
    ]  # fmt: skip
    shared = draw(model, far_t2i.stages(model), SETTINGS)
    assert np.allclose(draw(model, folded, SETTINGS), shared, rtol=1e-4, atol=1e-4 * np.abs(shared).max())


def test_guidance_1_is_the_conditional_half_alone(model: FART2I) -> None:
    class Rows(TorchEngine):
        def run(self, stage: str, inputs: Any, constants: Any = None) -> Any:
            outputs = super().run(stage, inputs, constants)
            seen.append((stage, len(next(iter(outputs.values())))))
            return outputs

    def rows(guidance: float) -> set[int]:
        seen.clear()
        engine = Rows(far_t2i.stages(model))
        condition = context_condition(engine, torch.zeros(1, 8, 12), [0, None], [None, None])
        loop.sample(engine, INFO, loop.plan(INFO, {**SETTINGS, "guidance": guidance}), condition, SeedNoise([1, 2]))
        return {count for stage, count in seen if stage == "transformer"}

    seen: list[tuple[str, int]] = []
    assert rows(2.0) == {4}
    assert rows(1.0) == {2}


def test_the_plan_is_the_official_one() -> None:
    model = far_t2i_info(16)
    settings = loop.resolve_settings(model, {})
    wanted = {"levels": [0, 2, 3, 4, 5, 6, 7, 8, 10, 13], "steps": 100, "guidance": 3.0, "temperature": 1.0}
    assert settings == wanted | {"solver": "ddpm", "start": None, "guidance_floor": 1.0, "shared_noise": 0}
    plan = loop.plan(model, settings)
    assert {step.guidance for step in plan} == {3.0}
    assert [step.constants["lowpass"] for step in plan] == settings["levels"]  # the second step's too
    assert [step.constants["count"] for step in plan[:4]] == [0, 4, 13, 28]
    assert plan[-1].constants["count"] == 216
    assert [round(float(step.temperature), 4) for step in (plan[0], plan[-1])] == [0.8025, 1.0]
    assert loop.resolve_settings(INFO, {})["levels"] == [0, 1, 2, 3]


@pytest.mark.parametrize("scales", [(3.0,), (3.0, 1.0)])
def test_noise_is_shared_below_a_level(scales: tuple[float, ...]) -> None:
    settings = loop.resolve_settings(far_t2i_info(16), {"shared_noise": 1})
    assert settings["levels"] == list(range(16))
    plan = merge_guidance([loop.plan(far_t2i_info(16), {**settings, "guidance": scale}) for scale in scales])
    assert [step.shared for step in plan] == [True] + [False] * 15


def test_known_latents_are_kept(model: FART2I) -> None:
    kept = np.random.default_rng(1).standard_normal((2, 16, 4)).astype(np.float32)
    keep = np.zeros((2, 4, 4), bool)
    keep[:, :2] = True
    stages = [*far_t2i.stages(model), far.place_stage(model.config)]
    latents = draw(model, stages, SETTINGS, KeptRegion(torch.from_numpy(kept), keep))
    assert np.array_equal(latents[:, :8], kept[:, :8])
    assert not np.allclose(latents[:, 8:], draw(model, stages, SETTINGS)[:, 8:], rtol=1e-3)  # the rest follows


def test_the_step_that_sees_nothing_has_a_graph_without_empty_arrays(tiny: Any) -> None:
    manifest = open_bundle(tiny.t2i_bundle).manifest

    def taken(count: int) -> Graph:
        return manifest.graph("transformer", {"level": 1, "lowpass": 1, "count": count})

    assert [spec.name for spec in taken(0).inputs] == ["context", "level"]
    assert {"latents", "visible", "restore"} <= {spec.name for spec in taken(1).inputs}
    assert far_t2i.transformer_stage(load_checkpoint(tiny.t2i).model).profile["count"][0] == 1


def test_graphs_are_what_tensorrt_10_3_parses(tiny: Any) -> None:
    for path in sorted(tiny.t2i_bundle.glob("*.onnx")):
        graph = onnx.load(path, load_external_data=False)
        assert [(entry.domain, entry.version) for entry in graph.opset_import if entry.domain == ""] == [("", 20)]
        assert {node.domain for node in graph.graph.node} == {""}
        operators = {node.op_type for node in graph.graph.node}
        if path.stem not in ("decode", "encode"):
            assert not operators & {"If", "Loop", "NonZero", "Resize", "GatherND", "ScatterND", "Compress"}


def test_latents_are_low_passed_in_the_graph(model: FART2I) -> None:
    latents: NDArray[np.float32] = np.random.default_rng(2).standard_normal((1, 16, 4)).astype(np.float32)
    order = torch.arange(16)[None]
    inputs = {"context": torch.zeros(1, 8, 32), "visible": order, "restore": order, "level": torch.tensor([2])}
    graph = far_t2i.transformer_stage(model).module
    with torch.no_grad():
        inside = graph(latents=torch.from_numpy(latents), lowpass=torch.tensor([2]), **inputs)
        outside = graph(latents=torch.from_numpy(lowpass(latents, 2)), lowpass=torch.tensor([4]), **inputs)
    assert torch.allclose(inside, outside, atol=1e-5)


def test_arithmetic_by_visible_tokens(model: FART2I) -> None:
    config = model.config
    with torch.device("meta"):
        other = FART2I(config)
        latents, context = torch.empty(1, 16, 4), torch.empty(1, 8, 32)
        indices = (torch.empty(1, 5, dtype=torch.int64), torch.empty(1, 16, dtype=torch.int64))
    wanted = count_flops(other.features, (latents, context, *indices)) + 2.0 * 16 * 32 * 32
    stage = far_t2i.transformer_stage(model)
    graph = Graph("transformer", "transformer", "", (), (), 1e-4, flops=dict(stage.flops))
    assert row_flops(graph, {"count": 5}) == pytest.approx(wanted)
    first = far_t2i.transformer_stage(model, nothing_visible=True).flops
    assert set(first) == {""}
    assert first[""] < row_flops(graph, {"count": 1})
