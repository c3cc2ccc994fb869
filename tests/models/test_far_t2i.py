"""FAR-T2I loads with every size read from its tensors, and its network keeps what the sampler relies on."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from far_models.checkpoint.config_far_t2i import far_t2i_config
from far_models.checkpoint.load import Contents, load_checkpoint
from far_models.far import restore_indices
from far_models.far_t2i import FART2I, FART2IConfig
from far_runtime.errors import FarError

TINY = FART2IConfig(
    grid=4, channels=4, context_tokens=5, context_width=12, encoder_width=24, encoder_depth=1, encoder_heads=2,
    decoder_width=40, decoder_depth=2, decoder_heads=3, mlp_ratio=2.0, head_width=24, head_depth=2,
)  # fmt: skip


@pytest.fixture
def model() -> FART2I:
    torch.manual_seed(0)
    return FART2I(TINY).initialize().eval().requires_grad_(False)


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save({"model_ema": tensors, "args": argparse.Namespace(model="far_t2i", patch_size=1)}, path)
    return path


def test_sizes_and_heads_are_read_from_the_tensors(tmp_path: Path, model: FART2I) -> None:
    loaded = load_checkpoint(save(tmp_path / "checkpoint-last.pth", model.state_dict()))
    assert loaded.system == "far_t2i"  # though the head has FAR's level embedding
    assert loaded.model.config == TINY


def test_the_official_model_is_the_default() -> None:
    with torch.device("meta"):
        state = FART2I(FART2IConfig()).state_dict()
    assert far_t2i_config(Contents(Path("checkpoint-last.pth"), state, {}, {})) == FART2IConfig()


def test_metadata_may_state_another_head_width(tmp_path: Path) -> None:
    config = replace(TINY, head_dim=8, encoder_heads=3, decoder_heads=5, prediction="v")
    save_file(FART2I(config).state_dict(), tmp_path / "a.safetensors", {"config": json.dumps(asdict(config))})
    assert load_checkpoint(tmp_path / "a.safetensors").model.config == config
    with pytest.raises(FarError, match="24 rows, no multiple of the head width 7"):
        load_checkpoint(tmp_path / "a.safetensors", overrides={"head_dim": 7})
    with pytest.raises(FarError, match="head_dim='wide': expected a whole number"):
        load_checkpoint(tmp_path / "a.safetensors", overrides={"head_dim": "wide"})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("encoder_pos_embed_learned", (1, 19, 24), "19 positions for 16 tokens"),
        ("diffusion_pos_embed_learned", (1, 15, 40), "15 tokens do not form a square grid"),
        ("context_embed.weight", (24,), "context_embed.weight is .24., expected 2 dimensions"),
        ("fake_latent", (1, 5, 23), "fake_latent is .1, 5, 23., expected .1, 5, 24."),
    ],
)
def test_misshapen_tensors_are_named(
    tmp_path: Path, model: FART2I, name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(FarError, match=message):
        load_checkpoint(save(tmp_path / "c.pth", {**model.state_dict(), name: torch.zeros(shape)}))


def test_nan_is_named(tmp_path: Path, model: FART2I) -> None:
    state = model.state_dict()
    state["context_embed.bias"] = torch.full_like(state["context_embed.bias"], torch.nan)
    with pytest.raises(FarError, match=r"NaN or Inf in context_embed\.bias"):
        load_checkpoint(save(tmp_path / "c.pth", state))


def test_the_null_context_is_the_learned_table(model: FART2I) -> None:
    features = torch.randn(2, 5, 12)
    context = model.context(features, torch.tensor([0, 1]))
    assert torch.equal(context[0], model.context_embed(features)[0])
    assert torch.equal(context[1], model.fake_latent[0])


def test_hidden_tokens_do_not_matter_and_visible_ones_do(model: FART2I) -> None:
    latents, context = torch.randn(1, 16, 4), torch.randn(1, 5, 24)
    visible = torch.tensor([[2, 5, 11]])
    restore = restore_indices(visible, 16)
    z = model.features(latents, context, visible, restore)
    other = latents.clone()
    other[:, [i for i in range(16) if i not in (2, 5, 11)]] += 1
    assert torch.equal(model.features(other, context, visible, restore), z)
    other[:, 5] += 1
    assert not torch.allclose(model.features(other, context, visible, restore), z, atol=1e-3)


def test_with_every_token_visible_the_indices_change_nothing(model: FART2I) -> None:
    latents, context = torch.randn(2, 16, 4), torch.randn(2, 5, 24)
    everything = torch.arange(16).expand(2, -1)
    z = model.features(latents, context, everything, everything)
    assert torch.allclose(model.features(latents, context), z, atol=1e-6)


def test_the_first_step_depends_on_the_context_alone(model: FART2I) -> None:
    z = model.features(None, torch.randn(2, 5, 24))
    assert z.shape == (2, 16, 40)
    assert not torch.allclose(z[0], z[1], atol=1e-3)
