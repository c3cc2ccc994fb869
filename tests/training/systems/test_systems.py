"""What all commands promise: they go on exactly where they were, and leave checkpoints that can be exported."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
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

Run = Callable[..., Result]
Refused = Callable[..., str]
KINDS = ("vqvae", "mar", "far_t2i", "var", "residual", "plain")


def state_of(run: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        state: dict[str, Any] = torch.load(run / "checkpoint-last.pth", weights_only=True)
    return state


def same(a: object, b: object) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(
    kind: str, inputs: dict[str, Any], runs: dict[str, Path], run_train: Run, tmp_path: Path
) -> None:
    constant = ("-o", tmp_path / "run", "--schedule", "constant") if kind == "vqvae" else ("-o", tmp_path / "run")
    run_train(*inputs[kind], *constant, "--steps", 2)
    torch.manual_seed(12345)
    result = run_train(*inputs[kind], *constant, "--steps", 4, "--resume")
    assert "resumed" in result.output
    straight = runs[kind]
    if kind == "vqvae":
        straight = tmp_path / "straight"
        run_train(*inputs[kind], "-o", straight, "--schedule", "constant", "--steps", 4)
    ours, theirs = state_of(tmp_path / "run"), state_of(straight)
    assert ours["step"] == 4
    for part in ("model", "model_ema", "optimizer", "losses", "step", "rng"):
        assert same(ours[part], theirs[part]), part
    assert not same(ours["model"], ours["model_ema"])


@pytest.mark.parametrize("kind", ["mar", "far_t2i", "var"])
def test_checkpoints_can_be_exported(kind: str, runs: dict[str, Path], vae_run: Path, vqvae_run: Path) -> None:
    vae_file = vqvae_run / "vqvae.safetensors" if kind == "var" else vae_run / "vae.safetensors"
    vae = load_checkpoint(vae_file, expect=SYSTEMS[kind].vae).model
    zoo = load_checkpoint(runs[kind] / f"{kind}.safetensors", expect=kind)
    state = load_checkpoint(runs[kind] / "checkpoint-last.pth", expect=kind)
    assert zoo.model.config == state.model.config
    assert zoo.classes == state.classes == (() if kind == "far_t2i" else ("ant", "bee", "cat"))
    info = SYSTEMS[kind].info(zoo.model, vae)
    assert SYSTEMS[kind].stages(zoo.model, vae, info, None)
    settled = SAMPLERS[kind].resolve_settings(info, zoo.sampling)
    assert settled["guidance"] == 2.0
    if kind == "mar":
        assert (settled["iterations"], settled["steps"]) == (2, 2)
    assert Image.open(next((runs[kind] / "sheets").glob("samples-*.png"))).size[0] > 50


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
        wanted = encoder.features(torch.from_numpy(ids), torch.from_numpy(mask))[0].numpy()
    np.testing.assert_allclose(cached.features[1], wanted, rtol=1e-4, atol=1e-5)
    assert cached.index.tolist() == [0, 1, 2] * 4
    with pytest.raises(FarError, match="other pictures"):
        open_text_cache(text, np.arange(12) % 2)


@pytest.mark.parametrize("kind", ["mar", "far_t2i", "var"])
def test_a_run_may_start_from_a_checkpoint(
    kind: str, inputs: dict[str, Any], runs: dict[str, Path], run_train: Run, tmp_path: Path
) -> None:
    start, still = runs[kind] / f"{kind}.safetensors", ("--warmup", 0, "--lr", 1e-12, "--weight-decay", 0, "--steps", 1)
    result = run_train(*inputs[kind], "-o", tmp_path / "run", "--init", start, *still)
    assert result.exit_code == 0, result.output
    ours, theirs = state_of(tmp_path / "run")["model"], load_checkpoint(start, expect=kind).model.state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    with pytest.raises(FarError, match="tensors do not fit"):
        run_train(*inputs[kind], "-o", tmp_path / "other", "--init", start, *still, "--width", 32)


@pytest.mark.parametrize("kind", ["residual", "plain"])
def test_hybrids_leave_a_sheet_and_no_checkpoint_to_export(kind: str, runs: dict[str, Path]) -> None:
    assert Image.open(next((runs[kind] / "sheets").glob("samples-*.png"))).size[0] > 50
    with pytest.raises(FarError, match="no checkpoint of"):
        load_checkpoint(runs[kind] / "checkpoint-last.pth")


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
    assert "--iterations 17" in refused(*inputs["mar"], "--sheet-iterations", 17, *tail)
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
