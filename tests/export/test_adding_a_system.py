"""A system that no command has heard of is exported, drawn, repeated, verified, inspected and edited by all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from far_export.stages import SYSTEMS
from far_models.checkpoint import load as checkpoint
from far_runtime.cli.main import main
from far_runtime.model_info import MODEL_INFOS, MarInfo
from far_runtime.sampling import mar
from far_runtime.sampling.options import SETTINGS
from far_runtime.sampling.systems import SAMPLERS


@pytest.fixture
def one_shot(monkeypatch: pytest.MonkeyPatch) -> None:
    """MAR's network under a loop that draws all tokens at once, as docs/adding-a-system.md says to add it."""

    def as_mar(model: MarInfo, settings: Any) -> dict[str, Any]:
        return {
            **mar.resolve_settings(model, {"steps": settings["steps"], "guidance": settings["guidance"]}),
            "iterations": 1,
        }

    loop = SimpleNamespace(
        PRESETS=mar.PRESETS,
        resolve_settings=lambda model, given: {
            "steps": int(given.get("steps", 3)),
            "guidance": float(given.get("guidance", 2.0)),
        },
        plan=lambda model, settings, kept=0: mar.plan(model, as_mar(model, settings), kept),
        sample=mar.sample,
        preview_latents=mar.preview_latents,
    )
    like = SYSTEMS["mar"]
    signs = {"one_shot": ("diffloss.net.cond_embed.weight", checkpoint.build_mar), "klvae": checkpoint.SYSTEMS["klvae"]}
    monkeypatch.setattr(checkpoint, "SYSTEMS", signs)
    monkeypatch.setitem(SYSTEMS, "one_shot", replace(like, name="one_shot"))
    monkeypatch.setitem(MODEL_INFOS, "one_shot", MarInfo)
    monkeypatch.setitem(SAMPLERS, "one_shot", loop)  # type: ignore[arg-type]
    for name, official in (("steps", 3), ("guidance", 2.0)):
        monkeypatch.setitem(SETTINGS[name].official, "one_shot", official)


def far(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_all_commands_take_it(
    one_shot: None, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert far("export", tiny.mar, "--vae", tiny.vae, "-o", "bundle", "--default", "guidance=1.5") == 0
    assert far("generate", "bundle", "--label", 1, "--count", 2, "--each", "each", "--save-levels", "-o", "a.png") == 0
    drawn = sorted(Path("each").iterdir())
    assert [path.name for path in drawn] == ["1-seed-0.png", "1-seed-1.png"]
    assert far("generate", "bundle", "--like", drawn[1], "-o", "again.png") == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(drawn[1])))
    assert far("verify", "bundle", "--checkpoint", tiny.mar, "--vae", tiny.vae, "--json", "report.json") == 0
    report = json.loads(Path("report.json").read_text())
    assert report["passed"] and report["settings"] == {"steps": 3, "guidance": 1.5}
    capfd.readouterr()
    assert far("inspect", "bundle", "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["system"] == "one_shot"
    assert [row["tokens"] for row in facts["schedule"]] == [16]
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask).save("mask.png")
    edit = ("edit", "bundle", "--image", drawn[0], "--mask", "mask.png", "--label", 1, "-o", "edited.png")
    assert far(*edit) == 0
    before, after = np.asarray(Image.open(drawn[0])), np.asarray(Image.open("edited.png"))
    assert np.array_equal(after[:, :8], before[:, :8])
    assert far("generate", "bundle", "--iterations", 3) == 2
    assert "a one_shot model has no such setting; it takes --steps, --guidance" in capfd.readouterr().err
