"""Checkpoints load, or say by name what is wrong; nothing in them is executed."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from far_models.checkpoint import far_config, load_checkpoint, parse_overrides, read_contents
from far_models.far import FAR, PRESETS, FARConfig, preset
from far_models.kl_vae import AutoencoderKL, VAEConfig
from far_runtime.errors import FarError

TINY = FARConfig(
    grid=4, channels=4, classes=5, buffer=3, encoder_width=32, encoder_depth=1, encoder_heads=2,
    decoder_width=48, decoder_depth=2, decoder_heads=4, mlp_ratio=2.0, head_width=24, head_depth=2,
)  # fmt: skip


def tensors(config: FARConfig = TINY) -> dict[str, torch.Tensor]:
    return FAR(config).initialize().state_dict()


def save(path: Path, config: FARConfig = TINY, **args: Any) -> Path:
    other = {name: tensor + 1 for name, tensor in tensors(config).items()}
    arguments = argparse.Namespace(mask=config.masked, **args)
    torch.save({"model": other, "model_ema": tensors(config), "optimizer": {}, "epoch": 3, "args": arguments}, path)
    return path


HEADS = {"encoder_heads": 2, "decoder_heads": 4}


def test_sizes_are_read_from_the_tensors(tmp_path: Path) -> None:
    loaded = load_checkpoint(save(tmp_path / "c.pth"), overrides=HEADS)
    assert loaded.system == "far"
    assert loaded.model.config == TINY
    assert not loaded.model.training


def test_masked_and_heads_come_from_the_arguments(tmp_path: Path) -> None:
    masked = FARConfig(**{**vars(TINY), "masked": True})
    loaded = load_checkpoint(save(tmp_path / "c.pth", masked, **HEADS))
    assert loaded.model.config == masked


def test_weights_are_the_ema_unless_asked(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pth")
    ema = load_checkpoint(path, overrides=HEADS).model.mask_token
    raw = load_checkpoint(path, weights="model", overrides=HEADS).model.mask_token
    assert not torch.equal(ema, raw)


def test_safetensors_with_metadata_in_half_precision(tmp_path: Path) -> None:
    path = tmp_path / "far.safetensors"
    half = {name: tensor.half() for name, tensor in tensors().items()}
    metadata = {"config": json.dumps(vars(TINY) | {"prediction": "v"}), "classes": json.dumps(list("abcde"))}
    save_file(half, path, metadata)
    loaded = load_checkpoint(path)
    assert loaded.model.config.prediction == "v"
    assert loaded.classes == tuple("abcde")
    assert loaded.model.mask_token.dtype == torch.float32


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_recognised_by_their_tensors(name: str) -> None:
    with torch.device("meta"):
        state = FAR(preset(name)).state_dict()
    contents = read_contents_of(state)
    assert far_config(contents) == PRESETS[name]


def read_contents_of(state: dict[str, torch.Tensor]) -> Any:
    from far_models.checkpoint import Contents

    return Contents(Path("checkpoint-last.pth"), state, {"mask": False}, {})


def test_unknown_width_asks_for_the_heads(tmp_path: Path) -> None:
    with pytest.raises(FarError, match=r"--config encoder_heads=N"):
        load_checkpoint(save(tmp_path / "c.pth"))


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(FarError, match="does not divide"):
        load_checkpoint(save(tmp_path / "c.pth"), overrides={"heads": 5})


def test_every_misfit_is_named(tmp_path: Path) -> None:
    state = tensors()
    state.pop("decoder_norm.bias")
    state["extra.weight"] = torch.zeros(2)
    state["encoder_norm.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(FarError) as error:
        load_checkpoint(tmp_path / "c.pth", overrides=HEADS)
    message = str(error.value)
    assert "3 tensors" in message
    assert "missing decoder_norm.bias [48]" in message
    assert "not expected extra.weight [2]" in message
    assert "encoder_norm.weight is [7], expected [32]" in message


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "notes.pth"
    text.write_text("hello, this is no checkpoint")
    with pytest.raises(FarError, match="not a PyTorch checkpoint"):
        load_checkpoint(text)
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(FarError, match="not a safetensors file"):
        load_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(FarError, match="no such file"):
        load_checkpoint(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(FarError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pth")
    torch.save({"model_ema": {"a": 1}}, tmp_path / "none.pth")
    with pytest.raises(FarError, match="no tensors"):
        load_checkpoint(tmp_path / "none.pth")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(FarError, match="neither a FAR nor a KL-VAE"):
        load_checkpoint(tmp_path / "other.pth")


def test_a_checkpoint_cut_short(tmp_path: Path) -> None:
    whole = save(tmp_path / "c.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FarError, match="not a PyTorch checkpoint"):
        load_checkpoint(tmp_path / "cut.pth")


class Trap:
    """Pickles into a call of os.system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    trace = tmp_path / "trace"
    torch.save({"model": Trap(trace)}, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(FarError, match="more than tensors"):
        load_checkpoint(tmp_path / "c.pth")
    assert not trace.exists()


def test_kl_vae_sizes_and_leftovers_of_its_trainer(tmp_path: Path) -> None:
    config = VAEConfig(ch=48, multipliers=(1, 2), blocks=1, channels=4, patch=2, encoder_attention=False)
    state = AutoencoderKL(config).state_dict() | {"loss.logvar": torch.zeros(())}
    torch.save({"model": state}, tmp_path / "kl16.ckpt")
    loaded = load_checkpoint(tmp_path / "kl16.ckpt", expect="klvae")
    assert loaded.model.config == config


def test_the_other_kind_of_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FarError, match="expected klvae"):
        load_checkpoint(save(tmp_path / "c.pth"), overrides=HEADS, expect="klvae")


def test_overrides(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"masked": true}')
    assert parse_overrides(("heads=3", str(tmp_path / "c.json"), "prediction=v")) == {
        "heads": 3, "masked": True, "prediction": "v",
    }  # fmt: skip
    with pytest.raises(FarError, match="neither NAME=VALUE"):
        parse_overrides((str(tmp_path / "absent"),))
    with pytest.raises(FarError, match="unknown setting"):
        load_checkpoint(save(tmp_path / "d.pth"), overrides={"colour": 1})


def test_only_the_chosen_weights_and_the_arguments_are_kept(tmp_path: Path) -> None:
    contents = read_contents(save(tmp_path / "c.pth"))
    assert set(contents.tensors) == set(tensors())
    assert contents.args["mask"] is False
