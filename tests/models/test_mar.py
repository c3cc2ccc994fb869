"""MAR's checkpoints: told apart from FAR's by their tensors, with the presets' head counts."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from far_models.checkpoint.config import mar_config
from far_models.checkpoint.load import Contents, detect_system, load_checkpoint
from far_models.far import FAR, FARConfig
from far_models.mar import MAR, PRESETS
from far_runtime.errors import FarError

TINY = FARConfig(
    grid=4, channels=4, classes=5, buffer=3, encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=48,
    decoder_depth=2, decoder_heads=4, mlp_ratio=2.0, head_width=24, head_depth=2, masked=True,
)  # fmt: skip
HEADS = {"encoder_heads": 2, "decoder_heads": 4}
OFFICIAL = {
    "img_size": 256, "vae_embed_dim": 16, "vae_stride": 16, "patch_size": 1, "num_iter": 64, "cfg": 2.9,
    "cfg_schedule": "linear", "mask_ratio_min": 0.7, "class_num": 1000, "buffer_size": 64, "num_sampling_steps": "100",
    "diffusion_batch_mul": 4, "temperature": 1.0, "grad_checkpointing": False,
}  # fmt: skip
"""What main_mar.py saves in args: nothing says whether the model is masked."""


def tensors(config: FARConfig = TINY) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MAR(config).state_dict()


def save(path: Path, state: dict[str, torch.Tensor] | None = None, **args: Any) -> Path:
    state = tensors() if state is None else state
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": other, "model_ema": state, "epoch": 3, "args": argparse.Namespace(**OFFICIAL, **args)}, path)
    return path


def contents(state: dict[str, torch.Tensor], **args: Any) -> Contents:
    return Contents(Path("checkpoint-last.pth"), state, args, {})


def test_an_official_checkpoint_loads(tmp_path: Path) -> None:
    loaded = load_checkpoint(save(tmp_path / "checkpoint-last.pth"), overrides=HEADS)
    assert loaded.system == "mar"
    assert loaded.model.config == TINY
    assert isinstance(loaded.model, MAR) and not loaded.model.training
    assert loaded.source == {"file": "checkpoint-last.pth", "weights": "model_ema"}
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_recognised_by_their_tensors(name: str) -> None:
    with torch.device("meta"):
        state = MAR(PRESETS[name]).state_dict()
    assert detect_system(contents(state)) == "mar"
    assert mar_config(contents(state, **OFFICIAL, model=name)) == PRESETS[name]
    assert mar_config(contents(state)) == PRESETS[name]


def test_head_counts_of_the_presets() -> None:
    heads = {name: (p.encoder_heads, p.decoder_heads, p.encoder_width) for name, p in PRESETS.items()}
    assert heads == {"mar_base": (12, 12, 768), "mar_large": (16, 16, 1024), "mar_huge": (16, 16, 1280)}
    assert all(p.masked for p in PRESETS.values())


def test_the_level_embedding_alone_tells_far_from_mar() -> None:
    state = FAR(replace(TINY, masked=False)).state_dict()
    assert detect_system(contents(state)) == "far"
    without = {name: tensor for name, tensor in state.items() if "index_cond_embed" not in name}
    assert set(without) == set(tensors())
    assert detect_system(contents(without)) == "mar"


def test_another_system_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FarError, match="is a mar checkpoint; expected far here"):
        load_checkpoint(save(tmp_path / "c.pth"), overrides=HEADS, expect="far")


def test_a_width_of_no_preset_asks_for_the_heads(tmp_path: Path) -> None:
    with pytest.raises(FarError, match=r"width 32 is no preset's \(768, 1024, 1280\); give it: --config encoder_heads"):
        load_checkpoint(save(tmp_path / "c.pth"))
    assert load_checkpoint(save(tmp_path / "d.pth", **HEADS)).model.config == TINY


def test_it_is_masked_whatever_the_file_says_but_not_against_the_user(tmp_path: Path) -> None:
    assert load_checkpoint(save(tmp_path / "c.pth", mask=False), overrides=HEADS).model.config.masked
    assert load_checkpoint(tmp_path / "c.pth", overrides=HEADS | {"masked": "true"}).model.config.masked
    for masked in (False, "no"):
        with pytest.raises(FarError, match=r"--config masked=\w+: c.pth is a MAR, which is masked; leave it out"):
            load_checkpoint(tmp_path / "c.pth", overrides=HEADS | {"masked": masked})


def test_metadata_of_our_own_files(tmp_path: Path) -> None:
    config = replace(TINY, prediction="v", latent_scale=0.5)
    metadata = {"system": "mar", "config": json.dumps(asdict(config)), "sampling": json.dumps({"iterations": 8})}
    save_file(tensors(config), tmp_path / "mar.safetensors", metadata)
    loaded = load_checkpoint(tmp_path / "mar.safetensors")
    assert (loaded.system, loaded.model.config, loaded.sampling) == ("mar", config, {"iterations": 8})


def test_every_misfit_is_named(tmp_path: Path) -> None:
    state = tensors()
    state.pop("decoder_norm.bias")
    state["diffloss.net.cond_embed.weight"] = torch.zeros(3, 48)
    with pytest.raises(FarError) as error:
        load_checkpoint(save(tmp_path / "c.pth", state), overrides=HEADS)
    assert "2 tensors do not fit the model" in str(error.value)
    assert "missing decoder_norm.bias [48]" in str(error.value)
    assert "diffloss.net.cond_embed.weight is [3, 48], expected [24, 48]" in str(error.value)
