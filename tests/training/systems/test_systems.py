"""What all commands promise: they go on exactly where they were, and leave checkpoints that can be exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

from far_export.stages import SYSTEMS
from far_models.checkpoint.load import load_checkpoint
from far_runtime.errors import FarError
from far_runtime.sampling.systems import SAMPLERS
from training_states import identical, load_state

Run = Callable[..., Result]
Refused = Callable[..., str]
TRAINERS = ("vqvae", "mar", "far_t2i", "var", "residual", "plain")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_resume_is_exact(
    trainer: str, inputs: dict[str, Any], runs: dict[str, Path], run_train: Run, tmp_path: Path
) -> None:
    constant = ("-o", tmp_path / "run", "--schedule", "constant") if trainer == "vqvae" else ("-o", tmp_path / "run")
    run_train(*inputs[trainer], *constant, "--steps", 2)
    torch.manual_seed(12345)
    result = run_train(*inputs[trainer], *constant, "--steps", 4, "--resume")
    assert "resumed" in result.output
    straight = runs[trainer]
    if trainer == "vqvae":
        straight = tmp_path / "straight"
        run_train(*inputs[trainer], "-o", straight, "--schedule", "constant", "--steps", 4)
    resumed, reference = load_state(tmp_path / "run"), load_state(straight)
    assert resumed["step"] == 4
    for part in ("model", "model_ema", "optimizer", "losses", "step", "rng"):
        assert identical(resumed[part], reference[part]), part
    assert not identical(resumed["model"], resumed["model_ema"])


@pytest.mark.parametrize("trainer", ["mar", "far_t2i", "var"])
def test_checkpoints_can_be_exported(trainer: str, runs: dict[str, Path], vae_run: Path, vqvae_run: Path) -> None:
    vae_file = vqvae_run / "vqvae.safetensors" if trainer == "var" else vae_run / "vae.safetensors"
    vae = load_checkpoint(vae_file, expect=SYSTEMS[trainer].vae).model
    zoo = load_checkpoint(runs[trainer] / f"{trainer}.safetensors", expect=trainer)
    state = load_checkpoint(runs[trainer] / "checkpoint-last.pth", expect=trainer)
    assert zoo.model.config == state.model.config
    assert zoo.classes == state.classes == (() if trainer == "far_t2i" else ("ant", "bee", "cat"))
    info = SYSTEMS[trainer].info(zoo.model, vae)
    assert SYSTEMS[trainer].stages(zoo.model, vae, info, None)
    settings = SAMPLERS[trainer].resolve_settings(info, zoo.sampling)
    assert settings["guidance"] == 2.0
    if trainer == "mar":
        assert (settings["iterations"], settings["steps"]) == (2, 2)
    assert Image.open(next((runs[trainer] / "sheets").glob("samples-*.png"))).size[0] > 50


def test_vqvae_checkpoint_is_the_same_network(vqvae_run: Path, tokens: Path, pictures: Path) -> None:
    from far_models.pictures import open_pictures
    from far_training.data.tokens import coded_set, open_token_cache

    zoo = load_checkpoint(vqvae_run / "vqvae.safetensors", expect="vqvae").model
    state = load_checkpoint(vqvae_run / "checkpoint-last.pth", "model_ema", expect="vqvae").model
    assert zoo.config == state.config
    assert zoo.config.patch_nums == (1, 2, 3, 4)
    rows, flip = np.array([3, 7, 0]), np.array([False, True, True])
    cached = open_token_cache(tokens, vqvae_run / "vqvae.safetensors", zoo)
    assert torch.equal(cached.tokens(rows, flip), coded_set(zoo, open_pictures(pictures)).tokens(rows, flip))
    assert cached.names == ("ant", "bee", "cat")


def test_prompts_are_the_checkpoints_condition(runs: dict[str, Path], text: Path) -> None:
    notes = json.loads((text / "text.json").read_text())
    assert notes["prompts"][:3] == ["a picture of ant", "a picture of bee", "a picture of cat"]
    config = load_checkpoint(runs["far_t2i"] / "far_t2i.safetensors").model.config
    assert (config.context_tokens, config.context_width, config.head_dim) == (9, 12, 8)


def test_prompts_name_the_drawing_style(pictures: Path, tmp_path: Path) -> None:
    from far_models.pictures import open_pictures
    from far_training.data.prompts import prompts_of

    shutil.copytree(pictures, tmp_path / "styled")
    (tmp_path / "styled" / "styles.json").write_text(json.dumps([{"style": "ink"}, {"style": "clay"}]))
    styled = prompts_of(open_pictures(tmp_path / "styled"))
    assert styled[:3] == ["a ink emoji of ant", "a clay emoji of bee", "a ink emoji of cat"]
    (tmp_path / "styled" / "styles.json").write_text(json.dumps(["ink", "clay"]))
    with pytest.raises(FarError, match="captions"):
        prompts_of(open_pictures(tmp_path / "styled"))
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps([f"text {i}" for i in range(12)]))
    assert prompts_of(open_pictures(tmp_path / "styled"), captions)[11] == "text 11"


def test_cached_features_are_the_text_encoders(text: Path, tiny: Any) -> None:
    from far_models.text.encoder import load_text_encoder
    from far_runtime.conditioning.text import load_tokenizer, tokenize
    from far_training.data.prompts import open_text_cache

    cached = open_text_cache(text, np.arange(12) % 3)
    encoder = load_text_encoder(tiny.bert, 9)
    ids, mask, _ = tokenize(load_tokenizer(tiny.bert), encoder.settings, [cached.prompts[1]])
    with torch.no_grad():
        expected = encoder.features(torch.from_numpy(ids), torch.from_numpy(mask))[0].numpy()
    np.testing.assert_allclose(cached.features[1], expected, rtol=1e-4, atol=1e-5)
    assert cached.index.tolist() == [0, 1, 2] * 4
    with pytest.raises(FarError, match="other pictures"):
        open_text_cache(text, np.arange(12) % 2)


@pytest.mark.parametrize("trainer", ["mar", "far_t2i", "var"])
def test_a_run_may_start_from_a_checkpoint(
    trainer: str, inputs: dict[str, Any], runs: dict[str, Path], run_train: Run, tmp_path: Path
) -> None:
    start = runs[trainer] / f"{trainer}.safetensors"
    still = ("--warmup", 0, "--lr", 1e-12, "--weight-decay", 0, "--steps", 1)
    result = run_train(*inputs[trainer], "-o", tmp_path / "run", "--init", start, *still)
    assert result.exit_code == 0, result.output
    weights = load_state(tmp_path / "run")["model"]
    initial = load_checkpoint(start, expect=trainer).model.state_dict()
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in initial.items())
    with pytest.raises(FarError, match="tensors do not fit"):
        run_train(*inputs[trainer], "-o", tmp_path / "other", "--init", start, *still, "--width", 32)


@pytest.mark.parametrize("trainer", ["residual", "plain"])
def test_hybrids_leave_a_sheet_and_no_checkpoint_to_export(trainer: str, runs: dict[str, Path]) -> None:
    assert Image.open(next((runs[trainer] / "sheets").glob("samples-*.png"))).size[0] > 50
    with pytest.raises(FarError, match="no checkpoint of"):
        load_checkpoint(runs[trainer] / "checkpoint-last.pth")


def test_bad_input_is_named(
    inputs: dict[str, Any],
    pictures: Path,
    tiny: Any,
    runs: dict[str, Path],
    text: Path,
    refused: Refused,
    tmp_path: Path,
) -> None:
    tail = ("-o", tmp_path / "run", "--steps", 1)
    vae, vqvae = inputs["mar"][-1], inputs["var"][-1]
    assert "expected vqvae" in refused("var", "--data", pictures, "--vae", vae, *tail)
    assert "expected klvae" in refused("mar", "--data", pictures, "--vae", vqvae, *tail)
    assert "--tokens continuous" in refused(*inputs["var"], "--no-residual", *tail)
    assert "--scales" in refused(*inputs["var"], "--scales", "1,2,4", *tail)
    assert "--sheet-top-k" in refused(*inputs["plain"], "--sheet-top-k", 5, *tail)
    assert "latents of" in refused(*inputs["plain"], "--scales", "1,2,3", *tail)
    assert "--heads 3" in refused(*inputs["var"], "--heads", 3, *tail)
    assert "--classes" in refused(*inputs["var"], "--classes", 2, *tail)
    assert "--scales" in refused(*inputs["vqvae"], "--scales", "1,2", *tail)
    assert "iterations 17: expected" in refused(*inputs["mar"], "--sheet-iterations", 17, *tail)
    assert "cache-text" in refused(*inputs["far_t2i"][:-1], pictures, *tail)
    assert "--resume" in refused(*inputs["mar"], "-o", runs["mar"], "--steps", 5)
    again = refused(*inputs["mar"], "-o", runs["mar"], "--steps", 5, "--resume", "--mask-least", 0.5)
    assert "loss_mask_least" in again
    encoder = ("--text-encoder", tiny.bert, "--tokens", 9)
    assert "is there already" in refused("cache-text", "--data", pictures, *encoder, "-o", text)
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps(["only one"]))
    cache = ("cache-text", "--data", pictures, *encoder, "-o", tmp_path / "cache", "--captions", captions)
    assert "list of 12 texts" in refused(*cache)
    captions.write_text(json.dumps([*["a cat"] * 11, " "]))
    assert "picture 11 has an empty prompt" in refused(*cache)
    assert "expected a klvae or vqvae" in refused(
        "cache-latents", "--data", pictures, "--vae", runs["mar"] / "mar.safetensors", "-o", tmp_path / "cache"
    )
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_bad_scales_name_the_option(inputs: dict[str, Any], run_train: Run, tmp_path: Path) -> None:
    for scales in ("1,x", "2,1"):
        result = run_train(*inputs["vqvae"], "-o", tmp_path / "run", "--steps", 1, "--scales", scales)
        assert result.exit_code == 2
        assert "--scales" in result.output
