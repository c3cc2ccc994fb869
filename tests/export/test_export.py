"""`far export`: what a bundle holds, and that a failure leaves nothing behind and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from far_export.bundle_folder import check_replaceable, check_target
from far_export.cli.export import read_classes
from far_export.export import export_bundle
from far_export.onnx import check as onnx_check
from far_export.onnx import writer as onnx_export
from far_export.stages.stage import Stage
from far_models.kl_vae import AutoencoderKL, VAEConfig
from far_runtime.bundle import Bundle, open_bundle
from far_runtime.cli.main import main
from far_runtime.errors import CheckFailed, FarError
from far_runtime.pipeline import Pipeline
from far_runtime.storage.atomic import clear_leftovers, whole_folder


def graphs_of(bundle: Path) -> dict[str, onnx.ModelProto]:
    return {path.stem: onnx.load(path, load_external_data=False) for path in bundle.glob("*.onnx")}


def test_graphs_are_what_tensorrt_10_3_parses(tiny: Any) -> None:
    graphs = graphs_of(tiny.bundle) | graphs_of(tiny.masked_bundle)
    for model in (*graphs.values(), *graphs_of(tiny.mar_bundle).values()):
        assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain == ""] == [("", 20)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
    operators = [node.op_type for node in graphs["transformer"].graph.node]
    assert operators.count("LayerNormalization") == 8  # tokens, buffer, two in each of two blocks, two at the ends
    assert operators.count("Gelu") == 2


def test_weights_lie_in_one_file_inside_the_bundle(tiny: Any) -> None:
    for bundle in (tiny.bundle, tiny.masked_bundle, tiny.mar_bundle):
        names = {
            entry.value
            for model in graphs_of(bundle).values()
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert names == {"weights.bin"}


def test_graphs_of_all_levels_share_their_weights(tiny: Any) -> None:
    """Two graphs more cost no second copy of any weight."""
    places = [
        {(e.key, e.value) for e in tensor.external_data}
        for name, model in graphs_of(tiny.masked_bundle).items()
        if name.startswith("transformer")
        for tensor in model.graph.initializer
        if tensor.name.endswith("mlp.fc1.bias") or "class_table" in tensor.name
    ]
    assert len(places) > len({frozenset(place) for place in places})
    shared, per_level = ((b / "weights.bin").stat().st_size for b in (tiny.bundle, tiny.masked_bundle))
    assert per_level < 1.1 * shared


def test_nothing_of_the_exporting_machine_stays_in_a_graph(tiny: Any) -> None:
    for bundle in (tiny.bundle, tiny.masked_bundle, tiny.mar_bundle):
        for path in bundle.glob("*.onnx"):
            content = path.read_bytes()
            assert b".py" not in content
            assert str(Path(torch.__file__).parents[1]).encode() not in content


def test_a_first_level_takes_labels_alone(tiny: Any) -> None:
    first = open_bundle(tiny.masked_bundle).manifest.graph("transformer", {"level": 0, "lowpass": 4, "count": 0})
    assert [spec.name for spec in first.inputs] == ["labels"]


def test_manifest_says_what_the_checkpoint_says(tiny: Any) -> None:
    manifest = open_bundle(tiny.bundle).manifest
    assert manifest.system == "far"
    assert manifest.model.prediction == "v"
    assert manifest.model.image_size == 16
    assert len(manifest.classes) == manifest.model.classes == 10
    wanted = {"levels": [0, 1, 2, 3], "steps": "3", "guidance": 3.0, "temperature": 1.0}
    assert manifest.default_settings == wanted | {
        "solver": "ddpm",
        "start": None,
        "guidance_floor": 1.0,
        "shared_noise": 0,
    }
    assert manifest.source["checkpoint"] == {"file": "far.safetensors", "weights": ""}
    assert manifest.source["config"] == {}
    assert [graph.stage for graph in manifest.graphs] == ["transformer", "denoise", "decode", "place", "encode"]


@pytest.mark.parametrize("variant", ["far", "masked"])
def test_both_forms_draw_the_same_pictures(tiny: Any, tmp_path: Path, variant: str) -> None:
    """One graph for all levels and one per level differ in rounding only."""
    made, source = (tiny.bundle, tiny.far) if variant == "far" else (tiny.masked_bundle, tiny.masked)
    levels = [0, 2]
    other = tmp_path / "other"
    form = "per-level" if variant == "far" else "shared"
    export_bundle(source, tiny.vae, other, levels=form, defaults={"levels": levels, "steps": "3"}, editing=False)
    assert not {"encode", "place"} & {graph.stage for graph in open_bundle(other).manifest.graphs}
    latents = []
    for path in (made, other):
        with Pipeline.from_bundle(path, threads=1) as pipeline:
            latents.append(pipeline.generate([1, 7], [0, 1], levels=levels).latents)
    assert np.linalg.norm(latents[0] - latents[1]) < 1e-5 * np.linalg.norm(latents[1])


def test_a_graph_that_computes_something_else_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(tiny.bundle)
    graph = bundle.manifest.graph("decode", {})
    inputs = {"latents": np.zeros((2, 16, 4), np.float32)}
    wrong = {"decode": onnx_check.GraphCase(inputs, {"pixels": np.full((2, 16, 16, 3), 255, np.uint8)})}
    with pytest.raises(CheckFailed, match="graph decode: pixels differs"):
        onnx_check.check_graphs(Bundle(bundle.path, replace(bundle.manifest, graphs=(graph,))), wrong)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FarError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("a fault"), RuntimeError),
    ],
    ids=["full disk", "Ctrl-C", "fault"],
)
def test_a_failure_leaves_the_old_bundle_whole(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, expected: type[BaseException]
) -> None:
    target = Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))
    before = snapshot(tmp_path)

    def half_a_graph(stage: Stage, folder: Path, weights: onnx_export.WeightFile) -> None:
        (folder / f"{stage.name}.onnx").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(onnx_export, "_export", half_a_graph)
    with pytest.raises(expected) as caught:
        export_bundle(tiny.far, tiny.vae, target, defaults={"steps": "3"})
    if expected is FarError:
        assert "the disk is full" in str(caught.value)
    assert snapshot(tmp_path) == before
    open_bundle(target)


def test_a_failure_at_the_replacement_restores_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = an_old_bundle(tmp_path / "bundle")
    before = snapshot(tmp_path)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.suffix == ".part":
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt), whole_folder(target, check_replaceable=check_replaceable) as folder:
        (folder / "manifest.json").write_text("new")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("after", ["the first rename", "the second rename"])
def test_an_interrupt_at_the_replacement_leaves_one_bundle_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """The rename has succeeded when the signal arrives."""
    target = an_old_bundle(tmp_path / "bundle")
    before = snapshot(tmp_path)
    rename = Path.rename
    calls: list[Path] = []

    def interrupted(self: Path, to: Path) -> Path:
        made = rename(self, to)
        calls.append(self)
        if len(calls) == (1 if after == "the first rename" else 2):
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(target, check_replaceable=check_replaceable) as folder:
        (folder / "manifest.json").write_text("new")
    assert calls[0] == target
    assert snapshot(tmp_path) == (before if after == "the first rename" else {"bundle/manifest.json": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(("there", "at"), [(True, 1), (True, 2), (False, 1)])
def test_of_two_exports_at_once_one_stays_whole_and_the_other_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, at: int
) -> None:
    """The other process is faster between a look at the target and the rename number `at`."""
    target = tmp_path / "bundle"
    if there:
        an_old_bundle(target)
    rename = Path.rename
    calls: list[Path] = []

    def overtaken(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == at:
            if self == target:
                shutil.rmtree(target)  # it has just moved the old one aside
            else:
                an_old_bundle(target, created_by="the other")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", overtaken)
    with (
        pytest.raises(
            FarError, match=r"bundle: another process has put a folder there .* run the command again, or name another"
        ),
        whole_folder(target, check_replaceable=check_replaceable) as folder,
    ):
        (folder / "manifest.json").write_text("ours")
    assert len(calls) == at
    if calls[-1] != target:
        assert json.loads((target / "manifest.json").read_text())["created_by"] == "the other"
    assert {path.name for path in tmp_path.iterdir()} == ({"bundle"} if calls[-1] != target else set())


def an_old_bundle(folder: Path, **changes: Any) -> Path:
    """A folder that looks like an export of some version."""
    folder.mkdir()
    manifest = {"format": 1, "system": "far", "files": {"decode.onnx": {}, "sub/more.bin": {}, "gone.bin": {}}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    (folder / "decode.onnx").write_text("old")
    (folder / "sub").mkdir()
    (folder / "sub" / "more.bin").write_text("old")
    return folder


def test_the_new_bundle_replaces_the_old_one_and_nothing_else_stays(tmp_path: Path) -> None:
    target = an_old_bundle(tmp_path / "bundle", format=99)
    check_target(target)
    with whole_folder(target, check_replaceable=check_replaceable) as folder:
        (folder / "manifest.json").write_text("new")
    assert snapshot(tmp_path) == {"bundle/manifest.json": b"new"}


def test_the_folder_that_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    real = an_old_bundle(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to("real")
    check_target(link)
    with whole_folder(link, check_replaceable=check_replaceable) as folder:
        (folder / "manifest.json").write_text("new")
    assert link.is_symlink() and not real.is_symlink()
    assert snapshot(real) == {"manifest.json": b"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_files_that_arrive_during_the_export_stay(tmp_path: Path) -> None:
    target = an_old_bundle(tmp_path / "bundle")
    with (
        pytest.raises(FarError, match=r"mine\.txt"),
        whole_folder(target, check_replaceable=check_replaceable) as folder,
    ):
        (folder / "manifest.json").write_text("new")
        (target / "mine.txt").write_text("mine")
        before = snapshot(target)
    assert snapshot(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    gone, alive = process.pid, os.getppid()
    for name in (f".bundle.{gone}-abc.part", f".bundle.{alive}-abc.part", f".bundle.{gone}-abc.old", ".bundle.mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
    clear_leftovers(tmp_path / "bundle")
    assert set(snapshot(tmp_path)) == {
        "bundle/manifest.json",  # killed between the two renames: the old one is back
        f".bundle.{alive}-abc.part/manifest.json",
        ".bundle.mine/manifest.json",
    }


def test_a_killed_export_leaves_nothing(tiny: Any, tmp_path: Path) -> None:
    """SIGTERM half-way: the unfinished folder goes, too."""
    target = tmp_path / "bundle"
    command = [sys.executable, "-c", "from far_runtime.cli.main import main; main()", "export", tiny.far]
    process = subprocess.Popen([*map(str, command), "--vae", str(tiny.vae), "-o", str(target)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".bundle.*/weights.bin")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.decode().strip() == "interrupted"
    assert not list(tmp_path.iterdir())


def test_targets_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FarError, match="is a file"):
        check_target(tmp_path / "file")
    with pytest.raises(FarError, match="is a file, a folder is needed"):
        check_target(tmp_path / "file" / "bundle")
    with pytest.raises(FarError, match="holds files that are no bundle"):
        check_target(tmp_path)
    assert (tmp_path / "file").read_text() == "x"
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(FarError):
        check_target(tmp_path / "a")


@pytest.mark.parametrize(
    ("manifest", "other", "named"),
    [
        ({"manifest_version": 3, "name": "an extension"}, None, "decode.onnx"),
        ({"format": "1", "files": {"decode.onnx": {}}}, None, "decode.onnx"),
        ({"format": 1, "files": ["decode.onnx"]}, None, "decode.onnx"),
        ([1], None, "decode.onnx"),
        (None, None, "decode.onnx"),
        ({"format": 1, "files": {"decode.onnx": {}, "sub/more.bin": {}}}, "notes.txt", "notes.txt"),
        ({"format": 1, "files": {"decode.onnx": {}, "sub/more.bin": {}}}, "sub/notes.txt", "sub/notes.txt"),
        ({"format": 1, "files": {"decode.onnx": {}, "sub/more.bin": {}}}, "engines/notes.txt", "engines/notes.txt"),
        ({"format": 1, "files": {"decode.onnx": {}}}, None, "sub"),
    ],
)
def test_folders_with_other_files_are_refused(tmp_path: Path, manifest: Any, other: str | None, named: str) -> None:
    target = an_old_bundle(tmp_path / "folder")
    (target / "manifest.json").write_text("{" if manifest is None else json.dumps(manifest))
    if other:
        (target / other).parent.mkdir(exist_ok=True)
        (target / other).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(FarError, match=rf"holds files that are no bundle \({named}, say\), and they stay"):
        check_target(target)
    assert snapshot(tmp_path) == before


def test_engines_go_with_the_bundle_that_they_were_compiled_from(tmp_path: Path) -> None:
    target = an_old_bundle(tmp_path / "folder")
    (target / "manifest.json").write_text(json.dumps({"format": 1, "files": {"decode.onnx": {}, "sub/more.bin": {}}}))
    name = f"tensorrt-rtx-{'0' * 16}"
    for folder in (name, f".{name}.7.part"):
        (target / "engines" / folder).mkdir(parents=True)
        (target / "engines" / folder / "decode.plan").write_text("plan")
    (target / "engines" / f".{name}.lock").touch()
    check_target(target)


@pytest.mark.parametrize("name", [".", "", "..", "../bundle", "../../up/bundle", "/", "link"])
def test_the_current_folder_and_those_around_it_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "up").mkdir()
    here = an_old_bundle(tmp_path / "up" / "bundle")
    (here / "link").symlink_to(here)
    monkeypatch.chdir(here)
    with pytest.raises(FarError, match="is the current folder or one around it"):
        check_target(Path(name))


def command_fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The command's one line of error, after exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in captured.err
    return lines[0]


def test_bad_input_gets_one_line_and_exit_code_2(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    note = tmp_path / "notes.pth"
    note.write_text("no checkpoint")
    assert "not a PyTorch checkpoint" in command_fails(capsys, note, "--vae", tiny.vae, "-o", out)
    torch.save({"model_ema": {"x": Path("/")}}, tmp_path / "trap.pth")
    assert "more than tensors" in command_fails(capsys, tmp_path / "trap.pth", "--vae", tiny.vae, "-o", out)
    other = AutoencoderKL(VAEConfig(ch=8, multipliers=(1, 2), blocks=1, channels=8))
    torch.save({"model": other.state_dict()}, tmp_path / "other.ckpt")
    line = command_fails(capsys, tiny.far, "--vae", tmp_path / "other.ckpt", "-o", out)
    assert "latents have 8 channels" in line
    assert "latents of 4" in line
    assert "expected klvae" in command_fails(capsys, tiny.far, "--vae", tiny.far, "-o", out)
    assert "is a klvae checkpoint" in command_fails(capsys, tiny.vae, "--vae", tiny.vae, "-o", out)
    options = (tiny.far, "--vae", tiny.vae, "-o", out)
    assert "must rise" in command_fails(capsys, *options, "--default-levels", "0,3,2")
    assert "outside 0 to 3" in command_fails(capsys, *options, "--default-levels", "0,9")
    assert "expected a number of 0 or more" in command_fails(capsys, *options, "--default-guidance", "-1")
    line = command_fails(capsys, *options, "--default", "iterations=3")
    assert "--iterations: a far model has no such setting; it takes --levels, --steps" in line
    assert "--default nonsense: neither NAME=VALUE" in command_fails(capsys, *options, "--default", "nonsense")
    assert "unknown setting" in command_fails(capsys, *options, "--config", "colour=1")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    assert "2 class names" in command_fails(capsys, *options, "--classes", tmp_path / "names.txt")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "precious").write_text("x")
    assert "no bundle" in command_fails(capsys, tiny.far, "--vae", tiny.vae, "-o", tmp_path / "dir")
    assert not out.exists()


def test_weights_that_the_file_cannot_choose_from_are_refused(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--weights beside a file with a single state dict would be ignored without a word."""
    state = torch.load(tiny.far, weights_only=False)["model_ema"]
    torch.save(state, tmp_path / "flat.pth")
    told = ("--config", "heads=2", "--config", "masked=false", "--weights", "model_ema")
    for path, more in ((tiny.safetensors, told[4:]), (tmp_path / "flat.pth", told)):
        line = command_fails(capsys, path, "--vae", tiny.vae, "-o", tmp_path / "bundle", *more)
        assert line == f"error: --weights model_ema: {path.name} has a single set of weights; leave --weights out"
    torch.save({"model": state}, tmp_path / "one.pth")
    line = command_fails(capsys, tmp_path / "one.pth", "--vae", tiny.vae, "-o", tmp_path / "bundle", *told)
    assert "no weights called 'model_ema'; the file has model" in line
    assert not (tmp_path / "bundle").exists()


def test_class_names_from_files(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(["a", "b"]))
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert read_classes(tmp_path / "names.json") == read_classes(tmp_path / "names.txt") == ("a", "b")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(FarError, match="JSON list"):
        read_classes(tmp_path / "bad.json")
