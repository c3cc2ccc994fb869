"""FAR-T2I and VAR from an official-layout checkpoint to a repeated and an edited picture, by the commands that FAR and
MAR have (test_export, test_mar)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from far_runtime.cli.main import main


@dataclass(frozen=True)
class Way:
    """One system's part: what export and verify are given, what is drawn, a setting, its kind of step."""

    checkpoint: Path
    vae: Path
    more: tuple[str, ...]
    subject: tuple[str, ...]
    setting: tuple[str, str]
    kind: str


@pytest.fixture(params=["far_t2i", "var"])
def way(request: pytest.FixtureRequest, tiny: Any, tmp_path: Path) -> Way:
    if request.param == "far_t2i":
        text = ("--text-encoder", str(tiny.bert))
        return Way(tiny.t2i, tiny.vae, text, ("--prompt", "a red fox"), ("steps", "2"), "level")
    return Way(*var_checkpoints(tmp_path), (), ("--label", "3"), ("top_k", "5"), "scale")


def var_checkpoints(folder: Path) -> tuple[Path, Path]:
    """Flat state dicts, as the official files are."""
    import torch

    from far_models.var import VAR, VARConfig
    from far_models.vq_vae import VQVAE, VQVAEConfig

    torch.manual_seed(0)
    var = VAR(VARConfig(patch_nums=(1, 2, 3, 4), channels=32, vocabulary=20, classes=5, width=64, depth=1, heads=1))
    vqvae = VQVAE(VQVAEConfig(ch=32, multipliers=(1, 1), blocks=1, channels=32, vocabulary=20, patch_nums=(1, 2, 3, 4)))
    for model in (var, vqvae):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    paths = folder / "var_d1.pth", folder / "vae.pth"
    for model, path in zip((var, vqvae), paths, strict=True):
        torch.save(model.state_dict(), path)
    return paths


def far(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_from_checkpoint_to_repeated_and_edited_pictures(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, value = way.setting
    config = () if way.kind == "level" else ("--config", "patch_nums=[1,2,3,4]")
    source = (way.checkpoint, "--vae", way.vae, *way.more, *config)
    assert far("export", *source, "-o", "bundle", "--default", f"{name}={value}") == 0, capfd.readouterr().err
    capfd.readouterr()
    assert far("inspect", "bundle", "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert str(facts["defaults"][name]) == value
    assert facts["schedule"][0]["kind"] == way.kind
    assert facts["gflop_total"] > 0

    assert far("generate", "bundle", *way.subject, "--count", 2, "--each", "each", "--save-levels", "-o", "a.png") == 0
    drawn = sorted(Path("each").iterdir())
    first, second = (np.asarray(Image.open(path)) for path in drawn)
    assert first.shape == second.shape and (first != second).any()
    assert far("generate", "bundle", "--like", drawn[1], "-o", "again.png") == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), second)

    check = ("verify", "bundle", "--checkpoint", *source, *way.subject, "--json", "report.json")
    engines = ["onnxruntime"] + (["openvino"] if installed("openvino") else [])
    for engine in engines:
        assert far(*check, "--engine", engine) == 0, capfd.readouterr().err
        assert json.loads(Path("report.json").read_text())["passed"]

    side = first.shape[0]
    mask = np.zeros((side, side), np.uint8)
    mask[:, side // 2 :] = 255
    Image.fromarray(mask).save("mask.png")
    assert far("edit", "bundle", "--image", drawn[0], "--mask", "mask.png", *way.subject, "-o", "edited.png") == 0
    edited = np.asarray(Image.open("edited.png"))
    assert np.array_equal(edited[:, : side // 2], first[:, : side // 2])

    capfd.readouterr()
    assert far("generate", "bundle", *way.subject, "--iterations", 3) == 2
    assert "--iterations: a" in capfd.readouterr().err
    wrong = ("--label", "1") if way.kind == "level" else ("--prompt", "x")
    assert far("generate", "bundle", *wrong) == 2
    assert "in place of" in capfd.readouterr().err


def installed(module: str) -> bool:
    """Whether a library can be imported here."""
    from importlib.util import find_spec

    return find_spec(module) is not None
