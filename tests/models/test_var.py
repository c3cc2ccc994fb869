"""VAR: cached scales equal one masked pass, and its checkpoints load or say what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from far_models.checkpoint.config_var import parameters_of, var_config
from far_models.checkpoint.load import Contents, load_checkpoint, read_contents
from far_models.var import VAR, VARConfig, preset
from far_runtime.errors import FarError
from far_runtime.sampling.pyramid import SCALES_256, SCALES_512

TINY = VARConfig(patch_nums=(1, 2, 4), channels=6, vocabulary=20, classes=5, width=16, depth=3, heads=2)


def tiny(**changes: Any) -> VAR:
    """A tiny model with random weights everywhere."""
    torch.manual_seed(0)
    var = VAR(replace(TINY, **changes)).eval()
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.normal_(std=0.4)
    return var


VARIANTS = [{}, {"shared_aln": True}, {"attn_l2_norm": False}, {"patch_nums": (2, 3)}]


@pytest.mark.parametrize("changes", VARIANTS)
def test_scale_by_scale_with_a_cache_equals_one_masked_pass(changes: dict[str, Any]) -> None:
    var = tiny(**changes)
    labels = torch.tensor([4, 5])
    inputs = torch.randn(2, var.config.tokens - var.config.first_tokens, 6)
    with torch.no_grad():
        whole = var(labels, inputs)
        condition = var.class_emb(labels)
        modulation, of_head = var.modulations(condition)
        caches: list[Any] = [None] * var.config.depth
        for start, end in var.ranges:
            first = var.config.first_tokens
            x = var.first_input(condition)
            if start:
                x = var.word_embed(inputs[:, start - first : end - first]) + var.positions()[start:end]
            for i, block in enumerate(var.blocks):
                x, caches[i] = block(x, modulation[:, i], caches[i])
            torch.testing.assert_close(var.head(var.head_nm(x, of_head)), whole[:, start:end], rtol=1e-4, atol=1e-4)


def test_no_scale_sees_a_finer_one() -> None:
    var = tiny()
    inputs = torch.randn(1, 20, 6)
    changed = inputs.clone()
    changed[:, 4:] += 1  # the inputs of the last scale
    with torch.no_grad():
        before, after = (var(torch.tensor([1]), x) for x in (inputs, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


def test_stochastic_depth_drops_branches_in_training_only() -> None:
    torch.manual_seed(0)
    var = VAR(TINY, drop_path=0.9)
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.normal_(std=0.4)
    labels, inputs = torch.tensor([1]), torch.randn(1, 20, 6)
    drawn = [var(labels, inputs) for _ in range(8)]
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])
    var.eval()
    assert torch.equal(var(labels, inputs), var(labels, inputs))


def test_initial_model_predicts_evenly_and_passes_its_input_on() -> None:
    torch.manual_seed(0)
    var = VAR(TINY).initialize().eval()
    with torch.no_grad():
        logits = var(torch.tensor([1]), torch.randn(1, 20, 6))
        x = torch.randn(1, 4, 16)
        modulation, _ = var.modulations(var.class_emb(torch.tensor([1])))
        passed, _ = var.blocks[0](x, modulation[:, 0])
    assert logits.abs().max() < 0.5
    torch.testing.assert_close(passed, x, rtol=0, atol=1e-3)


def official_buffers(var: VAR) -> dict[str, torch.Tensor]:
    """What the official module saves beside its parameters."""
    buffers = {f"blocks.{i}.attn.zero_k_bias": torch.zeros(16) for i in range(var.config.depth)}
    return buffers | {
        "lvl_1L": torch.zeros(1, 21, dtype=torch.int64),
        "attn_bias_for_masking": torch.full((1, 1, 21, 21), -torch.inf),
    }


@pytest.mark.parametrize("changes", VARIANTS[:3])
def test_a_flat_state_dict_with_buffers_loads(tmp_path: Path, changes: dict[str, Any]) -> None:
    var = tiny(**changes)
    torch.save(var.state_dict() | official_buffers(var), tmp_path / "var.pth")
    overrides = {"patch_nums": [1, 2, 4]} | ({} if var.config.attn_l2_norm else {"heads": 2})
    loaded = load_checkpoint(tmp_path / "var.pth", overrides=overrides)
    assert loaded.system == "var"
    assert loaded.model.config == var.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), var.parameters(), strict=True))


def test_our_trainer_s_file_needs_no_options(tmp_path: Path) -> None:
    var = tiny(attn_l2_norm=False, mlp_ratio=2.0)
    metadata = {"system": "var", "config": json.dumps(asdict(var.config)), "classes": json.dumps(list("abcde"))}
    save_file(var.state_dict(), tmp_path / "var.safetensors", metadata)
    loaded = load_checkpoint(tmp_path / "var.safetensors")
    assert loaded.model.config == var.config
    assert loaded.classes == tuple("abcde")


@pytest.mark.parametrize("depth", [16, 20, 24, 30, 36])
def test_released_sizes_are_read_from_the_tensors(depth: int) -> None:
    with torch.device("meta"):
        state = VAR(preset(depth)).state_dict()
    config = var_config(Contents(Path("var.pth"), state, {}, {}))
    assert config == preset(depth)
    assert config.patch_nums == (SCALES_512 if depth == 36 else SCALES_256)
    assert config.shared_aln == (depth == 36)
    assert (config.width, config.heads) == (64 * depth, depth)


def contents_of(var: VAR) -> Contents:
    return Contents(Path("var.pth"), var.state_dict(), {}, {})


def test_unknown_scales_must_be_told() -> None:
    with pytest.raises(FarError, match=r"21 tokens in 3 scales .* --config patch_nums=\[1,2,4"):
        var_config(contents_of(tiny()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"patch_nums": [1, 2, 5]}, "30 tokens, 1 in the first; the tensors have 3 scales, 21 tokens"),
        ({"patch_nums": [1, 4, 2]}, "do not rise"),
        ({"patch_nums": [1, 2, 4], "width": 8}, "width=8: the tensors of var.pth say 16"),
        ({"patch_nums": [1, 2, 4], "heads": 4}, "heads=4: the tensors of var.pth say 2"),
        ({"patch_nums": "1,2,4"}, "expected a list of whole numbers"),
        ({"levels": 3}, "unknown setting"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(FarError, match=message):
        var_config(contents_of(tiny()), overrides)


def test_heads_that_cannot_be_read_must_be_told() -> None:
    var = tiny(attn_l2_norm=False)
    with pytest.raises(FarError, match="--config heads=N"):
        var_config(contents_of(var), {"patch_nums": [1, 2, 4]})
    with pytest.raises(FarError, match="3 attention heads do not divide the width 16"):
        var_config(contents_of(var), {"patch_nums": [1, 2, 4], "heads": 3})


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    state = tiny().state_dict()
    del state["head.weight"]
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(FarError, match=r"missing head\.weight; is this a whole VAR checkpoint"):
        load_checkpoint(tmp_path / "var.pth")
    state = tiny().state_dict()
    del state["blocks.1.attn.proj.bias"]
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(FarError, match=r"missing blocks\.1\.attn\.proj\.bias \[16\]"):
        load_checkpoint(tmp_path / "var.pth", overrides={"patch_nums": [1, 2, 4]})


def test_only_buffers_are_left_out(tmp_path: Path) -> None:
    var = tiny()
    torch.save(var.state_dict() | official_buffers(var), tmp_path / "var.pth")
    assert set(parameters_of(read_contents(tmp_path / "var.pth"))) == set(var.state_dict())
