"""Every command once at tiny size, exact resume, and bad input."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from numpy.typing import NDArray
from PIL import Image

from far_export.graphs import SYSTEMS
from far_export.torch_engine import TorchEngine
from far_models.checkpoint import load_checkpoint
from far_models.training.sheets import psnr, to_pixels
from far_runtime.errors import FarError
from far_runtime.noise import SeedNoise
from far_runtime.samplers import far as sampler
from far_runtime.samplers.base import label_condition

Run = Callable[..., Result]


def state_of(run: Path) -> dict:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(run / "checkpoint-last.pth", weights_only=True)


def same(a: object, b: object) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b


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
    from far_models.training.data import open_pictures
    from far_models.training.latents import encoded_set, open_cache

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
    from far_models.training.latents import open_cache

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
    from far_models.training import far

    vae = vae_run / "vae.safetensors"
    command = ("far", "--data", latents, "--vae", vae, "-o", tmp_path / "run", "--steps", 6, "--dropout", 0.2)
    forward, calls = far.FARLosses.forward, []

    def deadly(self: far.FARLosses, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 5:  # the first is the plan's
            raise KeyboardInterrupt
        return forward(self, *batch)

    monkeypatch.setattr(far.FARLosses, "forward", deadly)
    assert run_train(*command, "--save-minutes", 0).exit_code != 0
    assert state_of(tmp_path / "run")["step"] == 3
    monkeypatch.undo()
    torch.manual_seed(12345)
    result = run_train(*command, "--resume")
    assert "resumed" in result.output
    ours, theirs = state_of(tmp_path / "run"), state_of(far_run)
    for part in ("model", "model_ema", "optimizer", "step", "epoch", "rng"):
        assert same(ours[part], theirs[part]), part
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_another_seed_is_another_run(
    far_run: Path, latents: Path, vae_run: Path, run_train: Run, tmp_path: Path
) -> None:
    vae = vae_run / "vae.safetensors"
    run_train("far", "--data", latents, "--vae", vae, "-o", tmp_path / "run", "--steps", 6, "--seed", 1)
    assert not same(state_of(tmp_path / "run")["model"], state_of(far_run)["model"])


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


def sampled_latents(far: Path, vae: Path, labels: NDArray[np.int64], seeds: NDArray[np.int64]) -> NDArray[np.float32]:
    """Whole samples [n, C, g, g] in the VAE's scale, by 2 diffusion steps at guidance 2."""
    model, autoencoder = load_checkpoint(far).model, load_checkpoint(vae).model
    info = SYSTEMS["far"].info(model, autoencoder)
    engine = TorchEngine(SYSTEMS["far"].stages(model, autoencoder, info, None), "cpu")
    settings = sampler.settle(info, {"steps": "2", "guidance": 2.0})
    condition = label_condition(engine, labels.tolist(), info["classes"])
    drawn = np.asarray(engine.get(sampler.sample(engine, info, settings, condition, SeedNoise(seeds.tolist()))))
    grid, channels = model.config.grid, model.config.channels
    found: NDArray[np.float32] = drawn.transpose(0, 2, 1).reshape(-1, channels, grid, grid) / model.config.latent_scale
    return found


def test_decoder_learns_from_what_far_draws(
    pictures: Path, latents: Path, vae_run: Path, run_train: Run, tmp_path: Path
) -> None:
    """A decoder trained on redrawn latents, against a discriminator, in one go and in two: the same bits."""
    vae = vae_run / "vae.safetensors"
    run_train("far", "--data", latents, "--vae", vae, "-o", tmp_path / "far", "--steps", 1)
    far = ("--far", tmp_path / "far" / "far.safetensors")
    redrawn = ("--data", pictures, "--vae", vae, *far, "-o", tmp_path / "redrawn", "--draws", 4, "--levels", 4)
    assert run_train("redraw-latents", *redrawn, "--steps", 2).exit_code == 0
    drawn = np.load(tmp_path / "redrawn" / "shard-00000.npy")
    assert drawn.shape == (12, 4, 4, 4, 4)
    first, last = (sampled_latents(far[1], vae, np.arange(12) % 3, np.arange(12) * 4 + draw) for draw in (0, 3))
    np.testing.assert_allclose(drawn[:, 3], last, rtol=2e-3, atol=2e-3)  # all levels: nothing of the picture is left
    assert np.abs(drawn[:, 0] - first).max() > 0.01  # the last level alone: drawn from the picture
    options = ("--init", vae, "--freeze-encoder", "--redrawn", tmp_path / "redrawn", "--adversarial", 0.5)
    command = ("vae", "--data", pictures, *options, "--discriminator-width", 8, "--schedule", "constant")
    run_train(*command, "-o", tmp_path / "whole", "--steps", 4)
    run_train(*command, "-o", tmp_path / "parts", "--steps", 2)
    run_train(*command, "-o", tmp_path / "parts", "--steps", 4, "--resume")
    whole, parts = (state_of(tmp_path / name) for name in ("whole", "parts"))
    assert whole["args"].loss_adversarial == 0.5 and whole["args"].loss_redrawn_share == 0.5
    for kind in ("model", "model_ema", "beside"):
        assert all(torch.equal(whole[kind][name], parts[kind][name]) for name in whole[kind] | parts[kind]), kind
    written = load_checkpoint(tmp_path / "whole" / "vae.safetensors", expect="klvae").model
    assert not any("discriminator" in name for name in written.state_dict())
    told = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])["psnr_redrawn"]
    with torch.no_grad():
        decoded = to_pixels(written.decode(torch.from_numpy(drawn[:10, 0]).float()).numpy())
    assert told == pytest.approx(psnr(decoded, np.load(pictures / "images.npy")[:10]), abs=0.1)  # stored in float16

    with pytest.raises(FarError, match="exists already"):
        run_train("redraw-latents", *redrawn)
    with pytest.raises(FarError, match="draws 4 levels"):
        run_train("redraw-latents", *redrawn[:-6], "-o", tmp_path / "more", "--levels", 5)
    with pytest.raises(FarError, match=r"lacks a readable redrawn.json"):
        run_train("vae", "--data", pictures, "--redrawn", pictures, "-o", tmp_path / "none", "--steps", 1)
    with pytest.raises(FarError, match="made with another encoder"):
        run_train("vae", "--data", pictures, *options[3:5], "-o", tmp_path / "other", "--steps", 1)
    labels = np.load(tmp_path / "redrawn" / "labels.npy")
    np.save(tmp_path / "redrawn" / "labels.npy", labels[::-1])
    with pytest.raises(FarError, match="made for other pictures"):
        run_train(*command, "-o", tmp_path / "other", "--steps", 1)


def test_amp_auto_takes_the_faster(pictures: Path, run_train: Run, tmp_path: Path) -> None:
    result = run_train("vae", "--data", pictures, "-o", tmp_path / "run", "--steps", 1, amp="auto")
    assert "bfloat16" in result.output
    assert isinstance(state_of(tmp_path / "run")["amp"], bool)


def test_bad_input_is_named(pictures: Path, latents: Path, vae_run: Path, run_train: Run, tmp_path: Path) -> None:
    vae = vae_run / "vae.safetensors"
    tail = ("--vae", vae, "-o", tmp_path / "run", "--steps", 1)

    def refused(*args: object) -> str:
        with pytest.raises(FarError) as caught:
            run_train(*args)
        return str(caught.value)

    assert "no such folder" in refused("far", "--data", tmp_path / "nowhere", *tail)
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refused("far", "--data", tmp_path / "empty", *tail)
    assert "--levels batch" in refused("far", "--data", latents, "--mask", "code", "--levels", "sample", *tail)
    assert "--classes" in refused("far", "--data", latents, "--classes", 2, *tail)
    assert "exists already" in refused("cache-latents", "--data", pictures, "--vae", vae, "-o", latents)
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
