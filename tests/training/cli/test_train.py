"""Every command once at tiny size, exact resume, and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

from far_export.export import declare, load
from far_export.options import ExportOptions
from far_models.checkpoint.load import load_checkpoint
from far_runtime.errors import FarError
from training_states import identical, load_state

Run = Callable[..., Result]


def test_vae_run_leaves_what_it_promises(vae_run: Path) -> None:
    loaded = load_checkpoint(vae_run / "vae.safetensors", expect="klvae").model
    state = load_checkpoint(vae_run / "checkpoint-last.pth", "model_ema", expect="klvae").model
    assert loaded.config == state.config
    for name, tensor in state.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    records = [json.loads(line) for line in (vae_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "l1" in r] == [1, 2]
    assert {"psnr_train", "psnr_held_out"} <= records[-1].keys()
    assert Image.open(vae_run / "curves.png").size[0] > 100
    assert Image.open(next((vae_run / "sheets").glob("reconstruction-*.png"))).size[0] > 100
    assert list((vae_run / "tensorboard").iterdir())


def test_cached_latents_are_the_encoders(pictures: Path, vae_run: Path, latents: Path) -> None:
    from far_models.pictures import open_pictures
    from far_training.data.latents import encoded_set, open_cache

    cached = open_cache(latents, vae_run / "vae.safetensors")
    fresh = encoded_set(load_checkpoint(vae_run / "vae.safetensors").model, open_pictures(pictures))
    rows, flip = np.array([3, 7, 0]), np.array([False, True, True])
    for a, b in zip(cached.moments(rows, flip), fresh.moments(rows, flip), strict=True):
        torch.testing.assert_close(a, b)
    mirrored = cached.moments(rows, ~flip)[0]
    assert not torch.allclose(mirrored, cached.moments(rows, flip)[0])
    assert cached.scale == pytest.approx(fresh.scale, rel=1e-5)
    assert (cached.channels, cached.grid, cached.names) == (4, 4, ("ant", "bee", "cat"))


def test_latent_scale_makes_the_deviation_one(vae_run: Path, latents: Path) -> None:
    from far_training.data.latents import open_cache

    data = open_cache(latents)
    mean, log_variance = data.moments(data.train, np.zeros(len(data.train), bool))
    draws = torch.cat([mean + torch.randn_like(mean) * (0.5 * log_variance).exp() for _ in range(20)])
    assert float(draws.std()) * data.scale == pytest.approx(1, rel=0.02)


def test_far_run_is_an_ordinary_checkpoint(far_run: Path) -> None:
    state = load_checkpoint(far_run / "checkpoint-last.pth", expect="far")
    zoo = load_checkpoint(far_run / "far.safetensors", expect="far")
    assert zoo.classes == ("ant", "bee", "cat")
    assert zoo.model.config == state.model.config
    assert zoo.model.config.encoder_heads == 2
    assert zoo.model.config.prediction == "epsilon"
    assert Image.open(next((far_run / "sheets").glob("samples-*.png"))).size[0] > 20


def test_resume_after_a_kill_is_exact(
    far_run: Path, latents: Path, vae_run: Path, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies in its fourth step, with the checkpoint of the third behind it."""
    from far_training.systems import far

    vae = vae_run / "vae.safetensors"
    command = ("far", "--data", latents, "--vae", vae, "-o", tmp_path / "run", "--steps", 6, "--dropout", 0.2)
    forward, calls = far.FARLosses.forward, []

    def deadly(self: far.FARLosses, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 5:  # the first is that of the cost estimate
            raise KeyboardInterrupt
        return forward(self, *batch)

    monkeypatch.setattr(far.FARLosses, "forward", deadly)
    assert run_train(*command, "--save-minutes", 0).exit_code != 0
    assert load_state(tmp_path / "run")["step"] == 3
    monkeypatch.undo()
    torch.manual_seed(12345)
    result = run_train(*command, "--resume")
    assert "resumed" in result.output
    resumed, straight = load_state(tmp_path / "run"), load_state(far_run)
    for part in ("model", "model_ema", "optimizer", "step", "epoch", "rng"):
        assert identical(resumed[part], straight[part]), part
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_another_seed_is_another_run(
    far_run: Path, latents: Path, vae_run: Path, run_train: Run, tmp_path: Path
) -> None:
    vae = vae_run / "vae.safetensors"
    run_train("far", "--data", latents, "--vae", vae, "-o", tmp_path / "run", "--steps", 6, "--seed", 1)
    assert not identical(load_state(tmp_path / "run")["model"], load_state(far_run)["model"])


def test_far_trains_on_an_image_folder(vae_run: Path, run_train: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("dogs", "eels"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            picture = rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "data" / name / f"{i}.png")
    result = run_train(
        "far", "--data", tmp_path / "data", "--size", 16, "--vae", vae_run / "checkpoint-last.pth",
        "-o", tmp_path / "run", "--steps", 1, "--mask", "paper", "--prediction", "v",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    loaded = load_checkpoint(tmp_path / "run" / "far.safetensors")
    assert loaded.classes == ("dogs", "eels")
    assert loaded.model.config.masked
    assert loaded.model.config.prediction == "v"


def test_a_model_whose_first_level_draws_the_mean_shares_its_noise(
    latents: Path, vae_run: Path, run_train: Run, tmp_path: Path
) -> None:
    vae, out = vae_run / "vae.safetensors", tmp_path / "run"
    first = ("--first", "mean", "--first-share", 0.5, "--levels", "sample")
    command = ("far", "--data", latents, "--vae", vae, "-o", out, *first)
    assert run_train(*command, "--steps", 2).exit_code == 0
    sampling = load_checkpoint(out / "far.safetensors").sampling
    assert sampling["shared_noise"] == 1
    options = ExportOptions()
    manifest, _ = declare(load(out / "far.safetensors", vae, options), options)
    assert manifest.default_settings["shared_noise"] == 1
    assert run_train(*command, "--steps", 4, "--resume").exit_code == 0
    with pytest.raises(FarError, match="loss_first 'mean' -> 'latents'"):
        run_train(*command, "--first", "latents", "--steps", 5, "--resume")


def test_decoder_alone_leaves_the_latents(pictures: Path, vae_run: Path, run_train: Run, tmp_path: Path) -> None:
    start = vae_run / "vae.safetensors"
    result = run_train(
        "vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 2, "--init", start, "--freeze-encoder"
    )
    assert result.exit_code == 0, result.output
    before, after = (load_checkpoint(p).model.state_dict() for p in (start, tmp_path / "run" / "checkpoint-last.pth"))
    for name in before:
        frozen = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(before[name], after[name]) == frozen, name


def test_amp_auto_takes_the_faster(pictures: Path, run_train: Run, tmp_path: Path) -> None:
    result = run_train("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 1, amp="auto")
    assert "bfloat16" in result.output
    assert isinstance(load_state(tmp_path / "run")["amp"], bool)


def test_bad_input_is_named(
    pictures: Path, latents: Path, vae_run: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    vae = vae_run / "vae.safetensors"
    tail = ("--vae", vae, "-o", tmp_path / "run", "--steps", 1)
    assert "no such folder" in refused("far", "--data", tmp_path / "nowhere", *tail)
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refused("far", "--data", tmp_path / "empty", *tail)
    assert "cache them: far train cache-latents" in refused("far", "--data", pictures, "--first", "mean", *tail)
    assert "--first mean: without" in refused("far", "--data", latents, "--first", "mean", "--no-simplify", *tail)
    assert "--levels batch" in refused("far", "--data", latents, "--mask", "code", "--levels", "sample", *tail)
    assert "--classes" in refused("far", "--data", latents, "--classes", 2, *tail)
    assert "is there already" in refused("cache-latents", "--data", pictures, "--vae", vae, "-o", latents)
    assert "no end" in refused("vae", "--data", pictures, "-o", tmp_path / "run")
    assert "--resume" in refused("vae", "--data", pictures, "-o", vae_run, "--steps", 3)
    other = refused("vae", "--data", pictures, "-o", vae_run, "--steps", 3, "--resume", "--kl", 1)
    assert "loss_kl" in other
    shutil.copytree(pictures, tmp_path / "grey")
    np.save(tmp_path / "grey" / "images.npy", np.zeros((12, 16, 16), np.uint8))
    assert "expected uint8 [N, size, size, 3]" in refused("far", "--data", tmp_path / "grey", *tail)
    shutil.copytree(pictures, tmp_path / "short")
    np.save(tmp_path / "short" / "labels.npy", np.arange(5))
    assert "one per picture" in refused("far", "--data", tmp_path / "short", *tail)
    shutil.copytree(pictures, tmp_path / "odd")
    np.save(tmp_path / "odd" / "images.npy", np.zeros((12, 18, 18, 3), np.uint8))
    assert "stride" in refused("far", "--data", tmp_path / "odd", *tail)
    shutil.copytree(latents, tmp_path / "stale")
    notes = json.loads((latents / "latents.json").read_text())
    (tmp_path / "stale" / "latents.json").write_text(json.dumps({**notes, "vae_sha256": "0" * 64}))
    assert "another VAE" in refused("far", "--data", tmp_path / "stale", *tail)
    assert not (tmp_path / "run").exists()


def test_bad_multipliers_name_the_option(pictures: Path, run_train: Run, tmp_path: Path) -> None:
    result = run_train("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 1, "--multipliers", "1,two")
    assert result.exit_code == 2
    assert "--multipliers" in result.output
