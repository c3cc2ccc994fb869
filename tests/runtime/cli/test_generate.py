"""`far generate` from the outside: what it writes, what it repeats, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from far_runtime.bundle import MANIFEST, manifest_checksum
from far_runtime.cli.outputs import Outputs, level_files
from far_runtime.errors import FarError
from far_runtime.images.metadata import PictureMetadata
from far_runtime.images.writing import KEY, read_metadata, save_picture
from far_runtime.pipeline import Pipeline


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


def refused(result: Any, reason: str, code: int = 2) -> None:
    """One line on stderr that holds the reason, nothing on stdout, and the exit code."""
    assert result.code == code, result
    assert result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert reason in result.err


def test_sheet_and_single_pictures(far: Any, tiny: Any, tmp_path: Path) -> None:
    result = far("generate", tiny.bundle, "--label", 7, "--label", "fox terrier", "--count", 3, "--seed", 4,
                 "-o", "new/sheet.png", "--each", "each", "--threads", 1, "--engine", "onnxruntime")  # fmt: skip
    assert result.code == 0, result.err
    assert result.err == ""
    names = sorted(path.name for path in (tmp_path / "each").iterdir())
    assert names == [f"{name}-seed-{seed}.png" for name in ("2-fox-terrier", "7-lion") for seed in (4, 5, 6)]
    sheet = pixels(tmp_path / "new" / "sheet.png")
    left = sheet.shape[1] - 3 * 134
    for row, name in enumerate(["7-lion", "2-fox-terrier"]):  # in the order of the options
        for column, seed in enumerate([4, 5, 6]):
            single = pixels(tmp_path / "each" / f"{name}-seed-{seed}.png")
            top, start = sheet.shape[0] - (2 - row) * 134, left + column * 134
            tile = sheet[top : top + 128, start : start + 128]
            assert np.array_equal(tile[4::8, 4::8], single)
    assert "new/sheet.png: contact sheet of 6 pictures" in result.out
    assert "each: 6 PNG files" in result.out
    assert "6 pictures in " in result.out and "on onnxruntime:cpu" in result.out


def test_pictures_are_those_of_the_pipeline(far: Any, tiny: Any, pipeline: Pipeline, tmp_path: Path) -> None:
    far("generate", tiny.bundle, "--label", 3, "--count", 2, "--guidance", 2, "--temperature", 0.9, "--steps", "2:4",
        "--levels", "0,1,3", "--each", "each", "--threads", 1, "--engine", "onnxruntime")  # fmt: skip
    made = pipeline.generate([3, 3], [0, 1], guidance=2, temperature=0.9, steps="2:4", levels=[0, 1, 3])
    for seed in (0, 1):
        path = tmp_path / "each" / f"3-crane-seed-{seed}.png"
        assert np.array_equal(pixels(path), made.images[seed])
        assert read_metadata(path) == made.settings[seed]


def test_other_labels_and_counts_change_no_picture(far: Any, tiny: Any, tmp_path: Path) -> None:
    far("generate", tiny.bundle, "--label", 7, "--count", 2, "--each", "few", "--batch-size", 4)
    far("generate", tiny.bundle, "--label", 2, "--label", 7, "--count", 3, "--each", "many", "--batch-size", 4)
    for seed in (0, 1):
        few, many = (pixels(tmp_path / folder / f"7-lion-seed-{seed}.png") for folder in ("few", "many"))
        assert np.abs(few.astype(int) - many).max() <= 1  # a rounding of the last bit may show


def test_without_labels_the_first_eight_are_drawn(far: Any, tiny: Any, tmp_path: Path) -> None:
    assert far("generate", tiny.bundle, "--steps", 1).code == 0
    record = json.loads(Image.open(tmp_path / "out.png").info[KEY])
    assert [one["label"] for one in record["pictures"]] == list(range(8))


def test_a_single_picture_is_written_as_it_is(far: Any, tiny: Any, tmp_path: Path) -> None:
    result = far("generate", tiny.bundle, "--label", "tabby", "--label", 6, "-o", "one.png", "--each", "each")
    assert result.code == 0
    assert np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "each" / "6-tabby-seed-0.png"))
    assert read_metadata(tmp_path / "one.png").label == 6


def test_quiet_says_nothing(far: Any, tiny: Any) -> None:
    result = far("generate", tiny.bundle, "--label", 0, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize(
    ("given", "strip"),
    [(["--save-levels"], "pic-levels"), (["--save-levels=a/b"], "a/b"), (["--save-levels", "c.webp"], "c"),
     (["--save-levels", "d/"], "d/levels")],
)  # fmt: skip
def test_levels_as_strip_and_animation(far: Any, tiny: Any, tmp_path: Path, given: list[str], strip: str) -> None:
    result = far("generate", tiny.bundle, "--label", 1, "--count", 2, "-o", "pic.png", "--each", "each", *given)
    assert result.code == 0, result.err
    with Image.open(tmp_path / f"{strip}.webp") as animation:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
    assert len(frames) == 4
    assert np.array_equal(frames[-1], pixels(tmp_path / "pic.png"))  # the last level is the picture
    assert not np.array_equal(frames[0], frames[-1])
    sheet = pixels(tmp_path / f"{strip}.png")
    for row, seed in enumerate([0, 1]):
        top, left = sheet.shape[0] - (2 - row) * 134, sheet.shape[1] - 134
        last = sheet[top : top + 128, left : left + 128]
        assert np.array_equal(last[4::8, 4::8], pixels(tmp_path / "each" / f"1-red-fox-seed-{seed}.png"))


@pytest.mark.parametrize("variant", ["bundle", "masked_bundle", "mar_bundle"])
def test_like_repeats_pictures_of_every_batch_position(far: Any, tiny: Any, tmp_path: Path, variant: str) -> None:
    bundle = getattr(tiny, variant)
    far("generate", bundle, "--label", 1, "--label", 8, "--count", 2, "--seed", 11, "--batch-size", 3,
        "--guidance", 2.2, "--temperature", 0.95, "--steps", "2:3", "--each", "each")  # fmt: skip
    originals = sorted((tmp_path / "each").iterdir())
    assert sorted((read_metadata(path).batch, read_metadata(path).index) for path in originals) == [
        (1, 0), (3, 0), (3, 1), (3, 2),
    ]  # fmt: skip
    for original in originals:
        result = far("generate", bundle, "--like", original, "-o", "again.png")
        assert result.code == 0 and result.err == "", result.err
        assert f"{original}: repeated bit for bit" in result.out
        assert np.array_equal(pixels(tmp_path / "again.png"), pixels(original))
        assert read_metadata(tmp_path / "again.png") == read_metadata(original)


def test_like_warns_when_the_surroundings_differ(far: Any, tiny: Any, tmp_path: Path) -> None:
    far("generate", tiny.bundle, "--label", 1, "-o", "one.png", "--threads", 1, "--engine", "onnxruntime")
    with Image.open(tmp_path / "one.png") as image:
        record, kept = json.loads(image.info[KEY]), image.copy()
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(KEY, json.dumps({**record, "bundle": "feed", "engine": "torch:cpu", "engine_version": "2.13.0"}))
    kept.putpixel((0, 0), (1, 2, 3))
    kept.save(tmp_path / "other.png", pnginfo=text)
    result = far("generate", tiny.bundle, "--like", "other.png", "-o", "again.png", "--engine", "onnxruntime")
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert result.err.startswith("warning: other.png: its bits may not come back: bundle feed then, ")
    assert "engine torch:cpu then, onnxruntime:cpu now; engine version 2.13.0 then" in result.err
    assert "other.png: 1 of its pixels came out differently" in result.out


def test_like_never_replaces_the_picture_that_it_repeats(far: Any, tiny: Any) -> None:
    far("generate", tiny.bundle, "--label", 1, "--each", ".", "-q")
    refused(far("generate", tiny.bundle, "--like", "out.png"), "out.png: -o would replace the file given with --like")
    refused(
        far("generate", tiny.bundle, "--like", "1-red-fox-seed-0.png", "--each", "."),
        "--each would replace the file given with --like",
    )


@pytest.mark.parametrize("option", ["--label=1", "--count=2", "--seed=0", "--guidance=1", "--steps=2", "--levels=0,1",
                                    "--temperature=1", "--batch-size=8", "--prompt=fog", "--negative=fog",
                                    "--iterations=2", "--guidance-schedule=linear", "--top-k=1", "--top-p=1",
                                    "--more-smooth=true"])  # fmt: skip
def test_like_refuses_what_the_picture_says(far: Any, tiny: Any, option: str) -> None:
    far("generate", tiny.bundle, "--label", 1, "-q")
    refused(far("generate", tiny.bundle, "--like", "out.png", option), f"--like takes {option.split('=')[0]} from")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--label", "10"], "label 10: out of range; this bundle has classes 0 to 9"),
        (["--label", "fox"], "2 classes fit (1 red fox, 2 fox terrier)"),
        (["--label", "dragonfry"], "the closest are 4 dragonfly"),
        (["--guidance", "-0.5"], "--guidance -0.5: expected a number of 0 or more"),
        (["--guidance", "nan"], "--guidance nan: expected a number of 0 or more"),
        (["--guidance", "much"], "'much' is not a valid float"),
        (["--temperature", "-1"], "temperature -1"),
        (["--levels", "0,2,1"], "levels must rise"),
        (["--levels", "0,4"], "level 4 is outside 0 to 3"),
        (["--levels", "all"], "whole numbers"),
        (["--steps", "0"], "expected 1 to 1000"),
        (["--steps", "1,2"], "names 2 levels, the schedule has 4"),
        (["--iterations", "4"], "--iterations: a far model has no such setting; it takes --levels, --steps, "),
        (["--top-k", "4", "--top-p", "1"], "--top-k, --top-p: a far model has no such setting; it takes --levels"),
        (["--prompt", "fog"], "draws from class labels, not from text; use --label in place of --prompt"),
        (["--negative", "fog"], "draws from class labels, not from text; use --label in place of --negative"),
        (["--count", "0"], "Invalid value for '--count'"),
        (["--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--seed", "-1"], "seed -1: expected 0 to"),
        (["--seed", str(2**64 - 1), "--count", "2"], f"seed {2**64}: expected 0 to"),
        (["--engine", "tensorflow"], "engine 'tensorflow': unknown; known: onnxruntime"),
        (["--engine", "onnxruntime:rocm"], "unknown provider; known: cpu, cuda, tensorrt"),
        (["--like", "nothing.png"], "nothing.png: no such file"),
        (["--threads", "1025"], "Invalid value for '--threads'"),
        (["--batch-size", "4097"], "Invalid value for '--batch-size'"),
        (["-o", "picture.jpg"], "picture.jpg: is written as PNG; use -o picture.png"),
        (["--colour", "red"], "No such option"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(far: Any, tiny: Any, arguments: list[str], reason: str) -> None:
    refused(far("generate", tiny.bundle, *arguments), reason)


def test_a_provider_that_this_onnxruntime_lacks(far: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    refused(far("generate", tiny.bundle, "--engine", "onnxruntime:cuda"), "pip install 'far-deploy[gpu]'")


def test_an_option_of_another_engine_is_warned_of(far: Any, tiny: Any) -> None:
    common = ("generate", tiny.bundle, "--label", "1", "--engine", "onnxruntime", "--threads", "1", "--no-arena", "-q")
    made = far(*common)
    assert (made.code, made.err) == (0, "")
    made = far(*common, "--mode", "throughput", "--no-cuda-graph")
    assert made.code == 0 and made.err.splitlines() == [
        "warning: --mode: of openvino, nothing to onnxruntime",
        "warning: --cuda-graph/--no-cuda-graph: of tensorrt and tensorrt-rtx, nothing to onnxruntime",
    ]


def test_an_engine_library_that_is_missing(far: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = far("generate", tiny.bundle, "--engine", "onnxruntime")
    refused(result, "onnxruntime is not installed; install it with: pip install 'far-deploy[cpu]'")
    monkeypatch.setitem(sys.modules, "openvino", None)
    refused(
        far("generate", tiny.bundle), "no engine is installed; install one with: pip install 'far-deploy[openvino]'"
    )


@pytest.mark.parametrize("name", ["weights.bin", "denoise.onnx", "transformer.onnx", "decode.onnx"])
def test_a_changed_byte_names_the_file(far: Any, bundle_copy: Path, name: str) -> None:
    data = bytearray((bundle_copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_copy / name).write_bytes(data)
    refused(far("generate", bundle_copy), f"{bundle_copy / name}: changed since export")


def test_a_file_cut_short_names_it_even_without_the_check(far: Any, bundle_copy: Path) -> None:
    data = (bundle_copy / "weights.bin").read_bytes()
    (bundle_copy / "weights.bin").write_bytes(data[:-1])
    refused(far("generate", bundle_copy, "--no-check"), f"weights.bin: {len(data) - 1} bytes, expected {len(data)}")


def test_a_missing_file(far: Any, bundle_copy: Path) -> None:
    (bundle_copy / "denoise.onnx").unlink()
    refused(far("generate", bundle_copy), "denoise.onnx: missing from the bundle")


def test_no_bundle(far: Any, tmp_path: Path) -> None:
    refused(far("generate", "nowhere"), "nowhere: no such bundle; make one with: far export")
    (tmp_path / "empty").mkdir()
    refused(far("generate", "empty"), "empty: no manifest.json, so it is no bundle")
    refused(far("generate"), "Missing argument 'BUNDLE'")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 99}, "format 99, this far-deploy reads 5 to 6; update it with: pip install -U far-deploy"),
        ({"format": 2}, "format 2 of an earlier far-deploy, this one reads 5 to 6; export it again"),
        ({"format": None}, "no format number"),
        ({"system": "far9"}, "system 'far9'"),
        ({"graphs": [{}]}, "incomplete or damaged"),
        ({"files": {"../weights.bin": {"bytes": 1, "sha256": ""}}}, "leads out of the bundle"),
    ],
)
def test_a_manifest_that_cannot_be_used(far: Any, bundle_copy: Path, change: dict[str, Any], reason: str) -> None:
    manifest = {**json.loads((bundle_copy / MANIFEST).read_text()), **change}
    manifest["sha256"] = manifest_checksum(manifest)
    (bundle_copy / MANIFEST).write_text(json.dumps(manifest))
    refused(far("generate", bundle_copy), reason)


@pytest.mark.parametrize(("then", "now"), [('"temperature": 1.0', '"temperature": 0.0'), ("0.0001", "0.4001")])
def test_a_changed_byte_of_the_manifest(far: Any, bundle_copy: Path, then: str, now: str) -> None:
    text = (bundle_copy / MANIFEST).read_text()
    assert then in text
    (bundle_copy / MANIFEST).write_text(text.replace(then, now))
    refused(far("generate", bundle_copy), f"{MANIFEST}: changed since export")


def test_weights_that_the_manifest_does_not_list(far: Any, bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / MANIFEST).read_text())
    del manifest["files"]["weights.bin"]
    manifest["sha256"] = manifest_checksum(manifest)
    (bundle_copy / MANIFEST).write_text(json.dumps(manifest))
    refused(far("generate", bundle_copy), "has no checksum of weights.bin")


def test_a_manifest_that_is_no_json(far: Any, bundle_copy: Path) -> None:
    (bundle_copy / MANIFEST).write_bytes(b"\xff{")
    refused(far("generate", bundle_copy), f"{MANIFEST}: cannot be read")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-o", "."], ".: is a folder; name a file with -o out.png"),
        (["-o", ""], ".: is a folder; name a file with -o out.png"),
        (["-o", ".."], "..: is a folder; name a file with -o ../out.png"),
        (["-o", "/"], "/: is a folder; name a file with -o /out.png"),
        (["-o", "picture"], "picture: is written as PNG; use -o picture.png"),
        (["-o", ".", "--save-levels"], "is a folder"),
        (["-o", "a.png", "--save-levels=a"], "a.png: -o and --save-levels would both write it"),
        (["-o", "a.png", "--save-levels=b/../a.webp"], "-o and --save-levels would both write it"),
        (["--like", "b.png", "-o", "b.png"], "b.png: -o would replace the file given with --like"),
        (["--like", "b.png", "--save-levels=b"], "b.png: --save-levels would replace the file given with --like"),
    ],
)
def test_names_that_would_lose_a_file(far: Any, tmp_path: Path, arguments: list[str], reason: str) -> None:
    """Refused before any bundle is opened."""
    if "--like" in arguments:
        settings = PictureMetadata("b", 0, "", 0, {"levels": [0]}, "e", "1", None, 1, 0, "1")
        save_picture(tmp_path / "b.png", np.zeros((4, 4, 3), np.uint8), settings)
    before = [path.name for path in tmp_path.iterdir()]
    refused(far("generate", "nowhere", *arguments), reason)
    assert [path.name for path in tmp_path.iterdir()] == before


def test_single_pictures_keep_away_from_the_other_files(tmp_path: Path) -> None:
    sheet = tmp_path / "0-seed-1.png"
    names = ["0-seed-0.png", "0-seed-1.png"]
    with pytest.raises(FarError, match="-o and --each would both write it"):
        Outputs(sheet, tmp_path).check_distinct(names)
    with pytest.raises(FarError, match="--save-levels and --each would both write it"):
        Outputs(tmp_path / "a.png", tmp_path, (sheet, sheet.with_suffix(".webp"))).check_distinct(names)
    with pytest.raises(FarError, match="--each would replace the file given with --like"):
        Outputs(tmp_path / "a.png", tmp_path).check_distinct(names, sheet)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(FarError, match="-o and --each would both write it"):
        Outputs(sheet, tmp_path / "link").check_distinct(names)
    Outputs(sheet, tmp_path / "each", level_files("", sheet)).check_distinct(names, tmp_path / "other.png")


def test_single_pictures_over_the_sheet(far: Any, tiny: Any, tmp_path: Path) -> None:
    arguments = ["--label", 1, "--count", 2, "--each", ".", "-o", "1-red-fox-seed-1.png"]
    refused(far("generate", tiny.bundle, *arguments), "1-red-fox-seed-1.png: -o and --each would both write it")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["-o", "--each", "--save-levels"])
@pytest.mark.parametrize("folder", ["file", "/proc"])
def test_outputs_that_cannot_be_written_are_found_before_the_sampling(
    far: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, folder: str
) -> None:
    def sampled(*_: object, **__: object) -> None:
        raise AssertionError("sampling has begun")

    monkeypatch.setattr(Pipeline, "generate", sampled)
    (tmp_path / "file").touch()
    result = far(
        "generate", tiny.bundle, f"{option}={folder}/below/x.png" if option != "-o" else f"-o{folder}/below/x.png"
    )
    refused(result, f"{folder}/below")
    assert "cannot be written" in result.err
    assert f"with {option}" in result.err


def test_a_folder_in_place_of_a_file(far: Any, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    refused(far("generate", tiny.bundle, "-o", "a.png"), "a.png: exists and is no file")


FULL_DISK = """
import resource, sys
from far_runtime.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # writing beyond 2000 bytes fails, as on a full disk
main(sys.argv[1:])
"""


def test_a_disk_that_fills_up_leaves_the_old_file(tiny: Any, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    target.write_text("old")
    command = [sys.executable, "-c", FULL_DISK, "generate", str(tiny.bundle), "--steps=1", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    assert done.stderr == f"error: {target}: cannot be written (File too large); free some space or write elsewhere\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert target.read_text() == "old"


def test_an_interrupt_leaves_nothing_behind(
    far: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "_generate", interrupted)
    result = far("generate", tiny.bundle, "--label", 0)
    assert (result.code, result.err.strip()) == (130, "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_on_a_terminal_only(far: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    shown = far("generate", tiny.bundle, "--label", 0, "--steps", 2)
    assert "level 3 (4 of 4)" in shown.err
    assert far("generate", tiny.bundle, "--label", 0, "--steps", 2, "--quiet").err == ""


def test_a_moved_bundle_draws_the_same(far: Any, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny.bundle, tmp_path / "moved")
    far("generate", tiny.bundle, "--label", 0, "-o", "a.png")
    result = far("generate", "moved", "--like", "a.png", "-o", "b.png")
    assert result.err == ""
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
