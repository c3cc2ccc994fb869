"""VAR's stages: the choice of tokens against plain NumPy, the graphs against torch, and what engines must be able to
take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from far_export.onnx.writer import export_stages
from far_export.stages import var_token_choice as var_choice
from far_export.stages.flops import count_flops
from far_export.stages.stage import Stage
from far_export.stages.var import stages, transformer_flops, var_info
from far_export.stages.var_editing import editing_stages
from far_export.stages.var_token_choice import (
    ChooseStageModule,
    SmoothStageModule,
    choose_stage,
    sort_ascending,
    top_k_top_p_filter,
)
from far_models.var import VAR, VARConfig
from far_models.vq_vae import VQVAE, VQVAEConfig
from far_runtime.errors import FarError
from far_runtime.sampling import var as loop
from far_runtime.sampling.base import KeptRegion, label_condition
from far_runtime.sampling.noise import SeedNoise
from golden.stage_engine import engine_of

SCALES = (1, 2, 4)
CONFIG = VARConfig(patch_nums=SCALES, channels=4, vocabulary=24, classes=5, width=16, depth=2, heads=2)
VQ = VQVAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=4, vocabulary=24, phis=3)
FORBIDDEN = {"Resize", "NonZero", "If", "Loop", "Scan", "GatherND", "ScatterND", "ScatterElements"}


@pytest.fixture(scope="module")
def models() -> tuple[VAR, VQVAE]:
    torch.manual_seed(0)
    var, vqvae = VAR(CONFIG).eval().requires_grad_(False), VQVAE(VQ).eval().requires_grad_(False)
    for parameter in var.parameters():
        parameter.normal_(std=0.3)
    return var, vqvae


@pytest.fixture(scope="module")
def declared(models: tuple[VAR, VQVAE]) -> dict[str, Stage]:
    return {stage.stage: stage for stage in [*stages(*models), *editing_stages(*models)]}


@pytest.fixture(scope="module")
def exported(declared: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """An ONNX Runtime engine over all stages but encoder and decoder (whose blocks are the KL-VAE's), and the folder of
    their graphs."""
    folder = tmp_path_factory.mktemp("var") / "bundle"
    own = [stage for stage in declared.values() if stage.stage not in ("encode", "decode")]
    engine = engine_of(own, "onnxruntime", folder)
    yield engine, folder
    engine.close()


def by_hand(logits: NDArray[np.float32], top_k: int, top_p: float) -> NDArray[np.bool_]:
    """Which tokens of one position the official filters leave, in float64, token by token."""
    left = np.ones(len(logits), bool)
    if top_k:
        left &= logits >= np.sort(logits)[-top_k]
    if top_p:
        weights = np.where(left, np.exp(logits.astype(np.float64) - logits.max()), 0)
        total = 0.0
        for token in np.argsort(logits):
            total += weights[token] / weights.sum()
            if total <= 1 - top_p:
                left[token] = False
        left[np.argmax(logits)] = True
    return left


SETTINGS = [(0, 0.0), (5, 0.0), (1, 0.0), (0, 0.9), (9, 0.5), (24, 0.99), (3, 1e-6), (0, 1.0)]


@pytest.mark.parametrize("most", [3840, 14])
@pytest.mark.parametrize(("top_k", "top_p"), SETTINGS)
def test_filters_leave_what_the_official_ones_leave(
    top_k: int, top_p: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 14 as TopK's limit, 24 logits are sorted in two parts."""
    monkeypatch.setattr(var_choice, "MAX_K", most)
    logits = np.random.default_rng(0).normal(size=(2, 30, 24)).astype(np.float32) * 2
    cut, tail = torch.tensor([24 - top_k if top_k else 0]), torch.tensor([1 - top_p if top_p else -1.0])
    left = top_k_top_p_filter(torch.from_numpy(logits), cut, tail)
    expected = np.apply_along_axis(by_hand, -1, logits, top_k, top_p)
    assert np.array_equal(np.isfinite(left.numpy()), expected)
    assert np.array_equal(left.numpy()[expected], logits[expected])


def test_sorting_of_the_official_vocabulary() -> None:
    x = torch.randn(3, 4096)
    assert torch.equal(sort_ascending(x), x.sort(-1)[0])


def test_choice_and_mixture() -> None:
    rng = np.random.default_rng(1)
    logits, noise = (torch.from_numpy(rng.normal(size=(2, 9, 24)).astype(np.float32)) for _ in range(2))
    codebook = torch.randn(24, 4)
    cut, tail = torch.tensor([24 - 7]), torch.tensor([0.1])
    left = top_k_top_p_filter(logits, cut, tail)
    tokens, embeddings = ChooseStageModule(codebook)(logits, noise, cut, tail)
    assert torch.equal(tokens, (left + noise).argmax(-1))
    assert torch.equal(embeddings, codebook[tokens])
    gain, sharpness = torch.tensor([1.5]), torch.tensor([4.0])
    mixed = SmoothStageModule(codebook)(logits, noise, cut, tail, gain, sharpness)
    torch.testing.assert_close(mixed, torch.softmax((left * 1.5 + noise) / 0.25, -1) @ codebook)


@pytest.mark.slow
def test_the_loop_draws_the_same_tokens_on_both_engines(
    models: tuple[VAR, VQVAE], declared: dict[str, Stage], exported: tuple[Any, Path], tmp_path: Path
) -> None:
    """Batch and rows are others than the traced ones; the first scale has no keys and values yet."""
    model = var_info(*models)
    engines = [engine_of(list(declared.values()), "torch", tmp_path / "unused"), exported[0]]
    features = np.random.default_rng(0).normal(size=(2, 16, 4)).astype(np.float32)
    keep = np.zeros((2, 4, 4), bool)
    keep[:, :2] = True
    for given in ({"top_k": 7, "guidance": 2.0}, {"guidance": 0, "top_p": 0.5}, {"more_smooth": True}):
        plan = loop.plan(model, loop.resolve_settings(model, given))
        for editing in (False, True):
            drawn = []
            for engine in engines:
                kept = KeptRegion(engine.put(features), keep) if editing else None
                condition = label_condition(engine, [1, 4], model.classes)
                latents = loop.sample(engine, model, plan, condition, SeedNoise([3, 4]), kept=kept)
                drawn.append(engine.get(latents))
            np.testing.assert_allclose(drawn[1], drawn[0], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_every_graph_computes_what_its_module_computes(declared: dict[str, Stage], exported: tuple[Any, Path]) -> None:
    engine = exported[0]
    sizes = {"batch": 2, "rows": 4, "picked": 4, "tokens": 3, "past": 2, "after": 5}
    for stage in declared.values():
        if stage.stage in ("encode", "decode"):
            continue
        example = stage.example(sizes, seed=1)
        with torch.no_grad():
            expected = stage.module(**example)
        expected = (expected,) if isinstance(expected, torch.Tensor) else expected
        got = engine.run(stage.stage, {name: engine.put(tensor.numpy()) for name, tensor in example.items()})
        assert len(got) == len(expected) == len(stage.outputs)
        for (name, array), tensor in zip(got.items(), expected, strict=True):
            np.testing.assert_allclose(engine.get(array), tensor.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_graphs_hold_nothing_that_tensorrt_refuses(exported: tuple[Any, Path], tmp_path: Path) -> None:
    whole = choose_stage(torch.randn(4096, 4), (1, 16, 16))
    export_stages([whole], tmp_path)
    for path in [*exported[1].glob("*.onnx"), tmp_path / "choose.onnx"]:
        graph = onnx.load(path, load_external_data=False).graph
        assert not {node.op_type for node in graph.node} & FORBIDDEN, path.name
        constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer if one.dims == [1]}
        limits = [constants[node.input[1]][0] for node in graph.node if node.op_type == "TopK"]
        assert all(limit <= 3840 for limit in limits)
        assert limits or path.stem not in ("choose", "smooth")


def test_arithmetic_is_counted(declared: dict[str, Stage]) -> None:
    stage = declared["transformer"]
    terms = transformer_flops(CONFIG)
    for tokens, past in ((4, 1), (16, 5)):
        example = stage.example({"rows": 1, "tokens": tokens, "past": past})
        counted = count_flops(lambda inputs: stage.module(**inputs), (example,))
        assert counted == terms["tokens"] * tokens + terms["tokens past"] * tokens * past + (
            terms["tokens tokens"] * tokens**2
        )
    for name in ("logits", "quantize", "smooth"):
        stage = declared[name]
        sizes = {"rows": 1, "batch": 1, "picked": 1, "tokens": 4, "after": 9}
        counted = count_flops(lambda inputs, stage=stage: stage.module(**inputs), (stage.example(sizes),))
        assert counted == sum(value * sizes.get(term, 1) for term, value in stage.flops.items()), name


def test_encode_and_decode_follow_the_vq_vae(models: tuple[VAR, VQVAE], declared: dict[str, Stage]) -> None:
    vqvae = models[1].with_scales(SCALES)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8))
    with torch.no_grad():
        features = vqvae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
        encoded = declared["encode"].module(pixels)
        torch.testing.assert_close(encoded, features.flatten(2).transpose(1, 2))
        embeddings = declared["tokenize"].module(encoded)
        assert torch.equal(embeddings, vqvae.quantize.embedding(vqvae.quantize.encode(encoded)))
        image = vqvae.decode(features)
        decoded = declared["decode"].module(encoded)
    expected = ((image.clamp(-1, 1) + 1) / 2 * 255).round().permute(0, 2, 3, 1)
    assert torch.equal(decoded, expected.to(torch.uint8))


def test_another_models_vq_vae_is_refused(models: tuple[VAR, VQVAE]) -> None:
    other = VQVAE(VQVAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=4, vocabulary=25))
    with pytest.raises(FarError, match="24 codes of 4 channels, the VQ-VAE has 25 of 4"):
        stages(models[0], other)


def test_manifest_s_model_is_plain(models: tuple[VAR, VQVAE]) -> None:
    model = var_info(*models)
    assert (model.grid, model.image_size, model.phis, model.classes) == (4, 8, 3, 5)
    assert model.patch_nums == SCALES
    assert model.record["vae"]["patch_nums"] == SCALES
