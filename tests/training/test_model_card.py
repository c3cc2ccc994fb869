"""The zoo folder and its card."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

import card_figures
import card_runs
import model_card
from far_models.checkpoint.load import load_checkpoint
from far_models.pictures import open_pictures
from far_models.reconstruction import reconstruction_psnr
from training_states import load_state

if TYPE_CHECKING:
    from conftest import Tiny


def test_nearest_finds_the_mirror_image() -> None:
    pool = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    asked = np.stack([pool[4, :, ::-1], np.clip(pool[2].astype(int) + 3, 0, 255).astype(np.uint8)])
    nearest, distance = card_figures.nearest(asked, pool)
    assert nearest.tolist() == [4, 2]
    assert distance[0] < 0.1
    assert 2 < distance[1] <= 3
    others, apart = card_figures.nearest(pool, pool, skip_self=True)
    assert (others != np.arange(6)).all()
    assert apart.min() > 0


def drawing_nothing(*files: object) -> contextlib.AbstractContextManager[object]:
    """In place of `drawing`: noise, and no bundle is exported."""

    def draw(labels: list[int], seeds: list[int], **settings: object) -> NDArray[np.uint8]:
        return np.random.default_rng(seeds).integers(0, 256, (len(labels), 16, 16, 3), dtype=np.uint8)

    return contextlib.nullcontext(draw)


def card(*arguments: object) -> Result:
    return CliRunner().invoke(model_card.main, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.sh"
    path.write_text("far train the-very-command\n")
    return path


def test_card_holds_what_was_measured(
    vae_run: Path, far_run: Path, pictures: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tiny"
    runs = ("--vae-run", vae_run, "--run", far_run, "--data", pictures)
    result = card(*runs, "--recipe", recipe, "--settings", "steps=2 guidance=2", "--weak", "it is tiny", "-o", out)
    assert result.exit_code == 0, result.output
    text = (out / "README.md").read_text()
    vae = load_checkpoint(out / "vae.safetensors", expect="klvae").model
    data = open_pictures(pictures)
    assert f"{reconstruction_psnr(vae, data, data.train):.1f} dB PSNR on the 10 training pictures" in text
    numbers = json.loads(result.output.splitlines()[0])
    assert f"12 samples {numbers['frechet_samples']:.1f}" in text
    assert f"reconstructions {numbers['frechet_reconstructions']:.1f}" in text
    for missed in numbers["missed"]:
        assert missed in text.partition("## What it is bad at")[2]
    for said in ("the-very-command", "Apache-2.0", "| steps | 2 | 6 |", "- it is tiny", "steps=2 guidance=2"):
        assert said in text
    far = load_checkpoint(out / "far.safetensors", expect="far")
    assert far.classes == ("ant", "bee", "cat")
    assert far.sampling == {"steps": 2, "guidance": 2}
    for name in ("samples.webp", "nearest.webp", "reconstructions.webp", "curves-1.png", "curves-2.png"):
        assert Image.open(out / name).size[0] > 20
        assert f"({name})" in text


def test_a_card_is_renewed_when_a_part_was_trained_further(
    vae_run: Path,
    far_run: Path,
    pictures: Path,
    recipe: Path,
    run_train: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_card, "drawing", drawing_nothing)
    out, data = tmp_path / "tiny", ("--data", pictures, "--recipe", recipe, "--settings", "steps=2 guidance=2")
    assert card("--vae-run", vae_run, "--run", far_run, *data, "-o", out).exit_code == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    again = ("--init", vae_run / "vae.safetensors", "--freeze-encoder", "-o", tmp_path / "finished", "--steps", 3)
    run_train("vae", "--data", pictures, *again)
    result = card("--renew", "--vae-run", tmp_path / "finished", *data, "-o", out)
    assert result.exit_code == 0, result.output
    text = (out / "README.md").read_text()
    assert f"| | KL-VAE ({vae_run.name}) | FAR ({far_run.name}) | KL-VAE (finished) |" in text
    assert "| steps | 2 | 6 | 3 |" in text
    after = {file.name: file.read_bytes() for file in out.iterdir()}
    assert after.keys() == before.keys() | {"curves-3.png"}
    for name in ("far.safetensors", "curves-1.png", "curves-2.png"):
        assert after[name] == before[name]
    assert after["vae.safetensors"] != before["vae.safetensors"]
    old = before["README.md"].decode()
    for key in ("| lr |", "| steps |", f"| {card_runs.LAST} |", "| kl |", "| draws |"):  # what is said of earlier runs
        was, now = (next(line for line in said.splitlines() if line.startswith(key)) for said in (old, text))
        assert now.startswith(was.rstrip("|").rstrip())
    for arguments, said in (
        (("--renew", *data, "-o", tmp_path / "none"), "cannot be read"),
        (("--vae-run", vae_run, *data, "-o", tmp_path / "none"), "give --run, or --renew"),
        (("--renew", "--vae-run", tmp_path / "finished", *data, "-o", out), "has a run of this name"),
        (("--renew", *data[:-1], "steps=3 guidance=2", "-o", out), 'give --settings "steps=2 guidance=2"'),
    ):
        refused = card(*arguments)
        assert refused.exit_code == 2 and said in refused.output


@pytest.mark.parametrize(("system", "settings"), [("mar", "iterations=2 steps=2"), ("far_t2i", "steps=2"), ("var", "")])
def test_other_systems_have_cards(
    system: str,
    settings: str,
    runs: dict[str, Path],
    vae_run: Path,
    vqvae_run: Path,
    tiny: Tiny,
    pictures: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if system != "far_t2i":  # drawn as FAR is, by labels
        monkeypatch.setattr(model_card, "drawing", drawing_nothing)
    vae = vqvae_run / "vqvae.safetensors" if system == "var" else vae_run / "vae.safetensors"
    common = ("--data", pictures, "--recipe", recipe, "--settings", settings, "-o", tmp_path / "out", "--per-class", 1)
    first = shutil.copytree(runs[system], tmp_path / "first")  # a run whose weights the other began with, say
    state = load_state(first)
    for average in state["model_ema"].values():
        average.zero_()
    torch.save({**state, "step": 3}, first / "checkpoint-last.pth")
    options = ("--run", first, "--run", runs[system], "--vae", vae, *common)
    if system == "far_t2i":
        assert "--text-encoder" in card(*options).output
        options = (*options, "--text-encoder", tiny.bert)
    result = card(*options)
    assert result.exit_code == 0, result.output
    card_text = (tmp_path / "out" / "README.md").read_text()
    assert f"(../{vae.parent.name}/README.md)" in card_text
    assert f"({first.name}) | {card_runs.TITLES[system]} ({runs[system].name}) |" in card_text
    assert "| steps | 3 | 4 |" in card_text
    weights = load_checkpoint(tmp_path / "out" / f"{system}.safetensors").model.state_dict()
    last = load_state(runs[system])["model_ema"]
    assert all(torch.allclose(weights[name], value, atol=1e-3) for name, value in last.items())
    assert (tmp_path / "out" / f"{system}.safetensors").exists()
    assert not list((tmp_path / "out").glob("v*vae.safetensors"))


def test_runs_that_cannot_be_told_of_are_refused(
    vae_run: Path, far_run: Path, runs: dict[str, Path], pictures: Path, recipe: Path, tmp_path: Path
) -> None:
    common = ("--data", pictures, "--recipe", recipe, "-o", tmp_path / "x")
    result = card("--vae-run", vae_run, "--run", far_run, "--run", runs["mar"], *common)
    assert result.exit_code == 2
    assert "--run: runs of far and mar; a card tells of one model" in result.output
    result = card("--vae-run", vae_run, "--run", tmp_path, *common)
    assert result.exit_code == 2
    assert "checkpoint-last.pth: no such file" in result.output
    same = shutil.copytree(far_run, tmp_path / "other" / far_run.name)
    result = card("--vae-run", vae_run, "--run", same, "--run", far_run, *common)
    assert result.exit_code == 2 and "in folders of the same name" in result.output
    state = load_state(same)
    state["args"].loss_first = "mean"
    torch.save(state, same / "checkpoint-last.pth")
    result = card("--vae-run", vae_run, "--run", same, *common)
    assert result.exit_code == 2 and 'give --settings "steps=10 guidance=2 shared_noise=1"' in result.output
    result = card("--run", far_run, *common)
    assert result.exit_code == 2
    assert "--vae-run" in result.output
