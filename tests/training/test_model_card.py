"""The zoo folder and its card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

import model_card
from far_models.checkpoint import load_checkpoint
from far_models.training.data import open_pictures
from far_models.training.vae import reconstruction_psnr


def test_nearest_finds_the_mirror_image() -> None:
    pool = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    asked = np.stack([pool[4, :, ::-1], np.clip(pool[2].astype(int) + 3, 0, 255).astype(np.uint8)])
    found, distance = model_card.nearest(asked, pool)
    assert found.tolist() == [4, 2]
    assert distance[0] == 0
    assert 2 < distance[1] <= 3
    others, apart = model_card.nearest(pool, pool, skip_self=True)
    assert (others != np.arange(6)).all()
    assert apart.min() > 0


def test_card_holds_what_was_measured(vae_run: Path, far_run: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.sh"
    recipe.write_text("far train the-very-command\n")
    out = tmp_path / "tiny"
    options = {
        "--vae-run": vae_run,
        "--far-run": far_run,
        "--data": pictures,
        "--recipe": recipe,
        "--steps": 2,
        "-o": out,
    }
    result = CliRunner().invoke(model_card.main, [str(part) for pair in options.items() for part in pair])
    assert result.exit_code == 0, result.output
    text = (out / "README.md").read_text()
    vae = load_checkpoint(out / "vae.safetensors", expect="klvae").model
    data = open_pictures(pictures)
    assert f"{reconstruction_psnr(vae, data, data.train):.1f} dB PSNR on the 10 training pictures" in text
    assert "the-very-command" in text
    assert "Apache-2.0" in text
    assert "| steps | 2 | 6 |" in text
    assert load_checkpoint(out / "far.safetensors", expect="far").classes == ("ant", "bee", "cat")
    for name in ("samples", "nearest", "reconstructions", "far-curves", "vae-curves"):
        assert Image.open(out / f"{name}.png").size[0] > 20
        assert f"({name}.png)" in text


def test_run_without_a_state_is_refused(vae_run: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.sh"
    recipe.write_text("true\n")
    options = {
        "--vae-run": vae_run,
        "--far-run": tmp_path,
        "--data": pictures,
        "--recipe": recipe,
        "-o": tmp_path / "x",
    }
    result = CliRunner().invoke(model_card.main, [str(part) for pair in options.items() for part in pair])
    assert result.exit_code == 2
    assert "checkpoint-last.pth: no such file" in result.output
