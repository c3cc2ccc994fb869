"""Latents of pictures that FAR redraws, and decoders that learn from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from click.testing import Result

from far_export.stages import SYSTEMS
from far_export.torch_engine import TorchEngine
from far_models.checkpoint.load import load_checkpoint
from far_models.reconstruction import psnr, to_pixels
from far_runtime.errors import FarError
from far_runtime.sampling import far as sampler
from far_runtime.sampling.base import label_condition
from far_runtime.sampling.noise import SeedNoise
from far_training.data.redrawn import Redrawer
from training_states import load_state

if TYPE_CHECKING:
    from conftest import Tiny

Run = Callable[..., Result]
LABELS, SEEDS = np.array([2, 0, 1]), np.array([7, 8, 9])


@pytest.fixture(scope="module")
def far(latents: Path, vae_run: Path, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FAR of four levels, trained for one step."""
    folder = tmp_path_factory.mktemp("far")
    run_train(
        "far",
        "--data",
        latents,
        "--vae",
        vae_run / "vae.safetensors",
        "-o",
        folder / "run",
        "--steps",
        1,
        "--prediction",
        "v",
    )
    return folder / "run" / "far.safetensors"


@pytest.fixture(scope="module")
def redrawn(pictures: Path, vae_run: Path, far: Path, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three draws of each of the pictures."""
    out = tmp_path_factory.mktemp("redrawn") / "latents"
    models = ("--vae", vae_run / "vae.safetensors", "--far", far)
    run_train("redraw-latents", "--data", pictures, *models, "-o", out, "--draws", 3, "--levels", 2, "--steps", 2)
    return out


def test_all_levels_are_a_sample_and_the_last_ones_follow_the_picture(tiny: Tiny) -> None:
    model, vae = load_checkpoint(tiny.safetensors).model, load_checkpoint(tiny.vae).model
    sampling = {"steps": "2", "guidance": 2.0}
    redrawer, info = Redrawer(model, vae, sampling), SYSTEMS["far"].info(model, vae)
    engine = TorchEngine(SYSTEMS["far"].stages(model, vae, info, None), "cpu")
    plan = sampler.plan(info, sampler.resolve_settings(info, sampling))
    condition = label_condition(engine, LABELS.tolist(), info.classes)
    drawn = np.asarray(engine.get(sampler.sample(engine, info, plan, condition, SeedNoise(SEEDS.tolist()))))
    sample = drawn.transpose(0, 2, 1).reshape(3, 4, 4, 4) / model.config.latent_scale
    torch.manual_seed(0)
    one, other = torch.randn(2, 3, 4, 4, 4)
    whole = redrawer.draw(one, LABELS, SEEDS, redrawer.levels)
    np.testing.assert_allclose(whole, sample, rtol=1e-4, atol=1e-4 * np.abs(sample).max())
    last = redrawer.draw(one, LABELS, SEEDS, 1)
    for unlike in (redrawer.draw(other, LABELS, SEEDS, 1), sample):
        assert np.abs(last - unlike).max() > 1e-3 * np.abs(sample).max()


def test_a_draw_is_of_its_picture_class_and_seed(redrawn: Path, far: Path, vae_run: Path, pictures: Path) -> None:
    model, vae = load_checkpoint(far).model, load_checkpoint(vae_run / "vae.safetensors").model
    pixels = torch.from_numpy(np.load(pictures / "images.npy")[[5]].transpose(0, 3, 1, 2)).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels)[0]
    expected = Redrawer(model, vae, {"steps": "2", "guidance": 2.0}).draw(latents, np.array([5 % 3]), np.array([16]), 2)
    drawn = np.load(redrawn / "shard-00000.npy")
    assert drawn.shape == (12, 3, 4, 4, 4)
    np.testing.assert_allclose(drawn[5, 1], expected[0], rtol=2e-3, atol=2e-3)  # stored in float16


def test_a_decoder_learns_from_them_and_resumes_exactly(
    redrawn: Path, pictures: Path, vae_run: Path, run_train: Run, tmp_path: Path
) -> None:
    """Against a discriminator, in one go and in two: the same bits."""
    options = ("--init", vae_run / "vae.safetensors", "--freeze-encoder", "--redrawn", redrawn, "--adversarial", 0.5)
    command = ("vae", "--data", pictures, *options, "--discriminator-width", 9, "--schedule", "constant")
    run_train(*command, "-o", tmp_path / "whole", "--steps", 4)
    run_train(*command, "-o", tmp_path / "parts", "--steps", 2)
    run_train(*command, "-o", tmp_path / "parts", "--steps", 4, "--resume")
    whole, parts = (load_state(tmp_path / name) for name in ("whole", "parts"))
    for part in ("model", "model_ema", "beside"):
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part] | parts[part]), part
    written = load_checkpoint(tmp_path / "whole" / "vae.safetensors", expect="klvae").model
    assert not any("discriminator" in name for name in written.state_dict())
    reported = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])["psnr_redrawn"]
    drawn = torch.from_numpy(np.load(redrawn / "shard-00000.npy")[:10, 0]).float()
    with torch.no_grad():
        decoded = to_pixels(written.decode(drawn).numpy())
    assert reported == pytest.approx(psnr(decoded, np.load(pictures / "images.npy")[:10]), abs=0.1)  # stored in float16

    resumed = ("vae", "--data", pictures, *options[:3], "-o", tmp_path / "whole", "--steps", 6, "--resume")
    with pytest.raises(FarError, match="other settings"):
        run_train(*resumed)
    with pytest.raises(FarError, match=r"adversarial 0\.5 -> 0\.0"):
        run_train(*resumed, "--redrawn", redrawn)


def test_what_does_not_fit_is_named(
    redrawn: Path, far: Path, pictures: Path, vae_run: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    vae, frozen = vae_run / "vae.safetensors", ("--init", vae_run / "vae.safetensors", "--freeze-encoder")
    draw = ("redraw-latents", "--data", pictures, "--vae", vae, "--far", far)
    assert "is there already" in refused(*draw, "-o", redrawn)
    assert "give at most 3" in refused(*draw, "-o", tmp_path / "more", "--levels", 4)
    shutil.copytree(pictures, tmp_path / "others")
    (tmp_path / "others" / "names.json").write_text(json.dumps(["bee", "ant", "cat"]))
    renamed = ("redraw-latents", "--data", tmp_path / "others", *draw[3:], "-o", tmp_path / "more")
    assert "its classes are not those of" in refused(*renamed)
    np.save(tmp_path / "others" / "images.npy", np.load(pictures / "images.npy")[::-1])
    train = ("-o", tmp_path / "run", "--steps", 1)
    assert "give --freeze-encoder" in refused("vae", "--data", pictures, "--redrawn", redrawn, *train)
    decoder = ("vae", "--data", pictures, "--freeze-encoder", *train)
    assert "lacks a readable redrawn.json" in refused(*decoder, "--redrawn", pictures)
    assert "made with another encoder" in refused(*decoder, "--redrawn", redrawn)
    others = ("vae", "--data", tmp_path / "others", *frozen, *train, "--redrawn", redrawn)
    assert "made of other pictures" in refused(*others)
    shutil.copytree(redrawn, tmp_path / "torn")
    (tmp_path / "torn" / "shard-00000.npy").unlink()
    torn = refused("vae", "--data", pictures, *frozen, *train, "--redrawn", tmp_path / "torn")
    assert "make" in torn and "far train redraw-latents" in torn
    assert not (tmp_path / "run").exists() and not (tmp_path / "more").exists()


def test_a_discriminator_needs_pictures_to_look_at(run_train: Run, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    np.save(tmp_path / "small" / "images.npy", np.zeros((4, 8, 8, 3), np.uint8))
    np.save(tmp_path / "small" / "labels.npy", np.zeros(4, np.int64))
    with pytest.raises(FarError, match="expected at least 12"):
        run_train("vae", "--data", tmp_path / "small", "--adversarial", 1, "-o", tmp_path / "run", "--steps", 1)
