"""FAR-T2I and VAR from an official-layout checkpoint (far export made the bundles of conftest.py) to a repeated and an
edited picture, by the commands that FAR and MAR have (test_export, test_mar)."""

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
    """What a system is exported from and drawn with."""

    bundle: Path
    source: tuple[object, ...]
    """Arguments of far verify: the checkpoint, and what else the bundle was exported with."""

    subject: tuple[str, ...]
    default: tuple[str, str]
    """A default setting that the bundle was exported with."""

    step: str
    """What inspect calls a step of the loop."""


@pytest.fixture(params=["far_t2i", "var"])
def way(request: pytest.FixtureRequest, tiny: Any) -> Way:
    if request.param == "far_t2i":
        source = (tiny.t2i, "--vae", tiny.vae, "--text-encoder", tiny.bert)
        return Way(tiny.t2i_bundle, source, ("--prompt", "a red fox"), ("steps", "3"), "level")
    source = (tiny.var, "--vae", tiny.vqvae, "--config", "patch_nums=[1,2,3,4]")
    return Way(tiny.var_bundle, source, ("--label", "3"), ("top_k", "5"), "scale")


def far(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_from_checkpoint_to_repeated_and_edited_pictures(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, value = way.default
    bundle = way.bundle
    assert far("inspect", bundle, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert str(facts["defaults"][name]) == value
    assert facts["schedule"][0]["kind"] == way.step
    assert facts["gflop_total"] > 0

    assert far("generate", bundle, *way.subject, "--count", 2, "--each", "each", "--save-levels", "-o", "a.png") == 0
    drawn = sorted(Path("each").iterdir())
    first, second = (np.asarray(Image.open(path)) for path in drawn)
    assert first.shape == second.shape and (first != second).any()
    assert far("generate", bundle, "--like", drawn[1], "-o", "again.png") == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), second)

    check = ("verify", bundle, "--checkpoint", *way.source, *way.subject, "--json", "report.json")
    engines = ["onnxruntime"] + (["openvino"] if installed("openvino") else [])
    for engine in engines:
        assert far(*check, "--engine", engine) == 0, capfd.readouterr().err
        assert json.loads(Path("report.json").read_text())["passed"]

    side = first.shape[0]
    mask = np.zeros((side, side), np.uint8)
    mask[:, side // 2 :] = 255
    Image.fromarray(mask).save("mask.png")
    assert far("edit", bundle, "--image", drawn[0], "--mask", "mask.png", *way.subject, "-o", "edited.png") == 0
    edited = np.asarray(Image.open("edited.png"))
    assert np.array_equal(edited[:, : side // 2], first[:, : side // 2])

    capfd.readouterr()
    assert far("generate", bundle, *way.subject, "--iterations", 3) == 2
    assert "--iterations: a" in capfd.readouterr().err
    wrong = ("--label", "1") if way.step == "level" else ("--prompt", "x")
    assert far("generate", bundle, *wrong) == 2
    assert "in place of" in capfd.readouterr().err


def installed(module: str) -> bool:
    """Whether a library can be imported here."""
    from importlib.util import find_spec

    return find_spec(module) is not None
