"""`far demo` with a tiny zoo: everything it promises is there, and a bundle that does not verify is a failure."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from far_export.cli.demo import zoo_files
from far_models.checkpoint.load import load_checkpoint
from far_models.checkpoint.save import export_checkpoint
from far_runtime.bundle import Bundle, open_bundle
from far_runtime.cli.main import main


@pytest.fixture
def zoo(tiny: Any, tmp_path: Path) -> Path:
    """One model, "tiny", that is drawn with 2 steps."""
    folder = tmp_path / "zoo" / "tiny"
    folder.mkdir(parents=True)
    with safe_open(tiny.safetensors, "pt") as file:
        metadata = {**file.metadata(), "sampling": '{"steps": "2", "guidance": 2.0}'}
        save_file({name: file.get_tensor(name) for name in file.keys()}, folder / "far.safetensors", metadata)  # noqa: SIM118
    save_file(torch.load(tiny.vae, weights_only=True)["model"], folder / "vae.safetensors")
    return folder.parent


def demo(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["demo", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_everything_is_written_and_a_failed_check_is_a_failure(
    tiny: Any, zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert demo("-o", out, "--zoo", zoo, "--model", "tiny") == 0
    assert {path.name for path in out.iterdir()} == {
        "bundle",
        "samples.png",
        "levels.png",
        "levels.webp",
        "verify.html",
    }
    output = capsys.readouterr().out
    assert all(str(out / name) in output for name in ("bundle", "samples.png", "levels.png", "verify.html"))
    schedule = open_bundle(out / "bundle").manifest.default_settings
    assert (schedule["steps"], schedule["guidance"]) == ("2", 2.0)  # the checkpoint's own settings
    # The same bundle against other weights does not pass, and that is an error.
    with safe_open(zoo / "tiny" / "far.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) + 0.1 for name in file.keys()}  # noqa: SIM118
        save_file(tensors, zoo / "tiny" / "far.safetensors", file.metadata())
    monkeypatch.setattr("far_export.export.export_bundle", lambda *_, **__: open_bundle(out / "bundle"))
    assert demo("-o", out, "--zoo", zoo, "--model", "tiny") == 1
    assert "relative error" in capsys.readouterr().err


def test_a_model_of_prompts_draws_those_of_its_folder(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export is the test above; here the bundle of the same checkpoint takes its place."""

    def export(*arguments: object, text_encoder: Path, **_: object) -> Bundle:
        assert text_encoder == tiny.bert
        return open_bundle(shutil.copytree(tiny.t2i_bundle, out / "bundle"))

    monkeypatch.setattr("far_export.export.export_bundle", export)
    folder, out = tmp_path / "zoo" / "words", tmp_path / "out"
    folder.mkdir(parents=True)
    model = load_checkpoint(tiny.t2i).model
    export_checkpoint(model, folder / "far_t2i.safetensors", (), {}, half=False)
    save_file(torch.load(tiny.vae, weights_only=True)["model"], folder / "vae.safetensors")
    (folder / "prompts.txt").write_text("a red apple\na green lion\n\na cat\n")
    assert demo("-o", out, "--zoo", folder.parent, "--model", "words") == 2
    assert "--text-encoder" in capsys.readouterr().err
    assert not out.exists()
    assert demo("-o", out, "--zoo", folder.parent, "--model", "words", "--text-encoder", tiny.bert) == 0
    assert "3 pictures on" in capsys.readouterr().out
    shown = Image.open(out / "samples.png").info.values()
    assert any("a green lion" in str(text) for text in shown)


def test_an_unknown_model_names_those_that_are_there(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--zoo", zoo, "--model", "huge") == 2
    assert "no model 'huge'" in (err := capsys.readouterr().err)
    assert "tiny" in err


def test_a_model_without_a_vae_draws_through_far_emojis(zoo: Path) -> None:
    (zoo / "far-emoji").mkdir()
    (zoo / "tiny" / "vae.safetensors").rename(zoo / "far-emoji" / "vae.safetensors")
    (zoo / "tiny" / "far.safetensors").rename(zoo / "tiny" / "mar.safetensors")
    files = zoo_files(zoo, "tiny")
    assert files == (zoo / "tiny" / "mar.safetensors", zoo / "far-emoji" / "vae.safetensors")
    (zoo / "tiny" / "vqvae.safetensors").touch()
    assert zoo_files(zoo, "tiny")[1].parent == zoo / "tiny"
