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

from far_models.checkpoint.load import far_config, load_checkpoint, parse_overrides, read_contents
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
    from far_models.checkpoint.load import Contents

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
        load_checkpoint(tmp_path / "c.pth", overrides=HEADS | {"masked": False})
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
    with pytest.raises(FarError, match=r"no checkpoint of .*far, mar, .*klvae \(its tensors are a\.weight"):
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


def bare(path: Path, state: dict[Any, Any] | None = None, **args: Any) -> Path:
    """A state dict under model_ema, with a plain dictionary of arguments."""
    torch.save({"model_ema": tensors() if state is None else state, "args": {**HEADS, **args}}, path)
    return path


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("masked=1", "masked=1: expected true or false"),
        ("masked=maybe", "masked='maybe': expected true or false"),
        ("heads=true", "heads=True: expected a whole number"),
        ("heads=0", "heads=0: expected a whole number"),
        ("heads=2.0", "heads=2.0: expected a whole number"),
        ("encoder_heads=-2", "encoder_heads=-2: expected a whole number"),
        ("prediction=x0", "prediction='x0': expected epsilon or v"),
        ("prediction=[1]", "expected epsilon or v"),
        ("latent_scale=0", "latent_scale=0: expected a finite number"),
        ("latent_scale=NaN", "expected a finite number"),
        ("latent_scale=true", "expected a finite number"),
        ("latent_scale=1e999", "expected a finite number"),
        ("grid=8", "grid=8: the tensors of c.pth say 4"),
        ("mlp_ratio=4", "mlp_ratio=4: the tensors of c.pth say 2.0"),
        ("head_depth=two", "head_depth='two': expected a whole number"),
    ],
)
def test_settings_that_are_not_allowed(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(FarError) as error:
        load_checkpoint(bare(tmp_path / "c.pth", mask=False), overrides=parse_overrides((setting,)))
    assert str(error.value).startswith("--config ") and message in str(error.value)


@pytest.mark.parametrize(("word", "value"), [("true", True), ("yes", True), ("False", False), ("no", False)])
def test_words_for_the_variant(tmp_path: Path, word: str, value: bool) -> None:
    settings = parse_overrides((f"masked={word}", "grid=4", "latent_scale=1"))
    config = load_checkpoint(bare(tmp_path / "c.pth", mask=not value), overrides=settings).model.config
    assert config.masked is value and config.latent_scale == 1


@pytest.mark.parametrize(("name", "value"), [("masked", "maybe"), ("grid", 5), ("encoder_heads", True)])
def test_metadata_is_checked_too(tmp_path: Path, name: str, value: Any) -> None:
    save_file(tensors(), tmp_path / "far.safetensors", {"config": json.dumps(vars(TINY) | {name: value})})
    with pytest.raises(FarError, match=f"far.safetensors: metadata {name}="):
        load_checkpoint(tmp_path / "far.safetensors")


def test_a_ratio_that_means_the_same_width_is_the_same_size(tmp_path: Path) -> None:
    config = FARConfig(**{**vars(TINY), "mlp_ratio": 2.71})
    save_file(tensors(config), tmp_path / "far.safetensors", {"config": json.dumps(vars(config))})
    assert load_checkpoint(tmp_path / "far.safetensors").model.config.mlp_ratio == 87 / 32


def test_metadata_of_a_kl_vae(tmp_path: Path) -> None:
    config = VAEConfig(ch=16, multipliers=(1, 2), blocks=1, channels=4, patch=2)
    state, path = AutoencoderKL(config).state_dict(), tmp_path / "vae.safetensors"
    save_file(state, path, {"config": json.dumps(vars(config))})
    assert load_checkpoint(path).model.config == config
    with pytest.raises(FarError, match=r"multipliers=\(1, 4\): the tensors of vae.safetensors say \(1, 2\)"):
        load_checkpoint(path, overrides={"multipliers": [1, 4]})


def test_the_variant_must_be_told(tmp_path: Path) -> None:
    with pytest.raises(FarError, match="--config masked=true or masked=false"):
        load_checkpoint(bare(tmp_path / "c.pth"))
    assert load_checkpoint(bare(tmp_path / "c.pth"), overrides={"masked": True}).model.config.masked
    assert load_checkpoint(bare(tmp_path / "d.pth", mask=True)).model.config.masked
    with pytest.raises(FarError, match="args mask='perhaps': expected true or false"):
        load_checkpoint(bare(tmp_path / "e.pth", mask="perhaps"))


def test_the_source_says_which_weights_were_taken(tmp_path: Path) -> None:
    settings = HEADS | {"masked": False}
    path = tmp_path / "c.pth"

    def taken(state: dict[str, Any], weights: str | None = None) -> str:
        torch.save(state, path)
        source = load_checkpoint(path, weights, settings).source
        assert source["file"] == "c.pth"
        return source["weights"]

    assert taken({"model": tensors(), "model_ema": tensors()}) == "model_ema"
    assert taken({"model": tensors(), "model_ema": tensors()}, "model") == "model"
    assert taken({"model": tensors(), "model_ema": None}) == "model"
    assert taken({"state_dict": tensors()}) == "state_dict"
    assert taken(tensors()) == ""
    with pytest.raises(FarError, match="no weights called 'model_ema'; the file has model; choose with --weights"):
        taken({"model": tensors(), "model_ema": None}, "model_ema")
    save_file(tensors(), tmp_path / "far.safetensors")
    assert load_checkpoint(tmp_path / "far.safetensors", overrides=settings).source["weights"] == ""


def test_a_kl_vae_has_its_own_order_of_weights(tmp_path: Path) -> None:
    state = AutoencoderKL(VAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=4)).state_dict()
    for names in (("model_ema", "state_dict", "model"), ("model_ema", "state_dict"), ("model_ema",)):
        torch.save(dict.fromkeys(names, state), tmp_path / "vae.ckpt")
        assert load_checkpoint(tmp_path / "vae.ckpt", expect="klvae").source["weights"] == names[-1]


def test_weights_are_not_asked_of_the_vae(tmp_path: Path) -> None:
    from far_export.load import load_pair

    vae = AutoencoderKL(VAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=4)).state_dict()
    torch.save({"state_dict": vae}, tmp_path / "vae.ckpt")
    model, decoder = load_pair(save(tmp_path / "c.pth", **HEADS), tmp_path / "vae.ckpt", "model")
    assert (model.source["weights"], decoder.source["weights"]) == ("model", "state_dict")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_named(tmp_path: Path, value: float) -> None:
    state = tensors()
    for name in ("decoder_norm.bias", "encoder_blocks.0.mlp.fc1.weight"):
        state[name].view(-1)[3] = value
    with pytest.raises(FarError, match=r"NaN or Inf in (?=.*decoder_norm.bias)(?=.*encoder_blocks.0.mlp.fc1.weight)"):
        load_checkpoint(bare(tmp_path / "c.pth", state, mask=False))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("decoder_embed.weight", torch.tensor(1.0), "decoder_embed.weight is [], expected 2 dimensions"),
        ("z_proj.weight", torch.zeros(5), "z_proj.weight is [5], expected 2 dimensions"),
        ("class_emb.weight", torch.zeros(0, 32), "class_emb.weight is [0, 32], expected 2 dimensions, none of them 0"),
        ("diffusion_pos_embed_learned", torch.zeros(1, 15, 48), "diffusion_pos_embed_learned is [1, 15, 48]: 15 tok"),
        ("encoder_pos_embed_learned", torch.zeros(1, 9, 32), "encoder_pos_embed_learned is [1, 9, 32]; expected at"),
        ("decoder_norm.bias", torch.zeros(48, dtype=torch.int8), "decoder_norm.bias is torch.int8, expected floating"),
        (7, torch.zeros(2, 3), "the name of tensor 7 [2, 3] is of type int"),
        ("z_proj.weight", torch.zeros(2, 2).to_sparse(), "tensor z_proj.weight [2, 2] is sparse"),
    ],
)
def test_misshapen_tensors_of_far(tmp_path: Path, name: Any, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(FarError) as error:
        load_checkpoint(bare(tmp_path / "c.pth", {**tensors(), name: tensor}, mask=False))
    assert message in str(error.value)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.zeros(32, 4), 0.1, 0, torch.qint8)
    with pytest.raises(FarError, match=r"tensor z_proj.weight \[32, 4\] is quantized; expected dense floating-point"):
        load_checkpoint(bare(tmp_path / "c.pth", {**tensors(), "z_proj.weight": quantized}, mask=False))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.conv_in.weight", torch.zeros(8), "encoder.conv_in.weight is [8], expected 4 dimensions"),
        ("encoder.conv_in.weight", torch.zeros(0, 3, 3, 3), "encoder.conv_in.weight is [0, 3, 3, 3], expected 4"),
        ("encoder.conv_in.weight", torch.zeros(8, 4, 3, 3), "encoder.conv_in.weight [8, 4, 3, 3] takes 4 channels"),
        ("encoder.down.1.block.0.conv1.weight", torch.zeros(9, 8, 3, 3), "expected a multiple of 8 channels"),
        ("post_quant_conv.weight", torch.tensor(0.0), "post_quant_conv.weight is [], expected 4 dimensions"),
    ],
)
def test_misshapen_tensors_of_a_kl_vae(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    state = AutoencoderKL(VAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=4)).state_dict()
    torch.save({**state, name: tensor}, tmp_path / "vae.ckpt")
    with pytest.raises(FarError) as error:
        load_checkpoint(tmp_path / "vae.ckpt")
    assert message in str(error.value)


def test_all_missing_size_tensors_and_unknown_names_are_listed(tmp_path: Path) -> None:
    state = {name: t for name, t in tensors().items() if not name.startswith(("z_proj.", "decoder_blocks."))}
    state |= {f"extra{i}.weight": torch.zeros(1) for i in range(7)}
    with pytest.raises(FarError) as error:
        load_checkpoint(bare(tmp_path / "c.pth", state, mask=False))
    message = str(error.value)
    assert "missing z_proj.weight, decoder_blocks.0.mlp.fc1.weight; not known: extra0.weight, " in message
    assert "extra4.weight;" in message and "extra5" not in message
    vae = AutoencoderKL(VAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=4)).state_dict()
    torch.save({n: t for n, t in vae.items() if not n.startswith("encoder.down")}, tmp_path / "vae.ckpt")
    with pytest.raises(FarError, match=r"missing encoder.down.0.block.0.conv1.weight; is this a whole AutoencoderKL"):
        load_checkpoint(tmp_path / "vae.ckpt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in tensors().items()}
    assert load_checkpoint(bare(tmp_path / "c.pth", wrapped, mask=False)).model.config == TINY
