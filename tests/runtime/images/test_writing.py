"""PNG files keep their settings, sheets and animations keep their pixels, and a file appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from far_runtime.errors import FarError
from far_runtime.images.metadata import PictureMetadata
from far_runtime.images.writing import (
    KEY,
    WEBP_LIMIT,
    check_animation,
    file_name,
    grid_size,
    picture_grid,
    read_metadata,
    save_animation,
    save_picture,
    save_sheet,
)
from far_runtime.storage.atomic import check_file, check_folder, whole_file

SETTINGS = PictureMetadata(
    bundle="0123456789abcdef", label=207, name="golden retriever", seed=2**64 - 1,
    sampling={"levels": [0, 12, 12, 4], "steps": [40, 60, 80, 100], "guidance": 3.1, "temperature": 0.1 + 0.2},
    engine="onnxruntime:cpu", engine_version="1.31.1", threads=None, batch=8, index=3, version="0.1.0",
)  # fmt: skip


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_a_picture_keeps_its_pixels_and_settings(tmp_path: Path) -> None:
    pixels = random_pixels(20, 30)
    save_picture(tmp_path / "a.png", pixels, SETTINGS)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)
    assert read_metadata(tmp_path / "a.png") == SETTINGS
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_settings_are_readable_json_in_a_text_chunk(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", random_pixels(4, 4), SETTINGS)
    record = json.loads(Image.open(tmp_path / "a.png").text[KEY])  # type: ignore[attr-defined]
    assert record["seed"] == 2**64 - 1
    assert record["name"] == "golden retriever"
    assert record["sampling"]["steps"] == [40, 60, 80, 100]
    assert b"tEXtfar-deploy\0{" in (tmp_path / "a.png").read_bytes()


@given(st.text(max_size=40), st.floats(0, 100), st.integers(0, 2**64 - 1))
def test_settings_survive_json(name: str, guidance: float, seed: int) -> None:
    sampling = {**SETTINGS.sampling, "guidance": guidance}
    settings = PictureMetadata.from_dict({**SETTINGS.to_dict(), "name": name, "sampling": sampling, "seed": seed})
    assert settings.sampling["guidance"] == guidance
    assert PictureMetadata.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def png_with(path: Path, text: str | None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text(KEY, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no settings of far-deploy in it"),
        ("{", "no PNG with settings"),
        ("[]", "incomplete or damaged"),
        ("{}", "incomplete or damaged .*bundle"),
        (json.dumps({**SETTINGS.to_dict(), "index": 8}), "picture 8 of a batch of 8"),
        (json.dumps({**SETTINGS.to_dict(), "sampling": 3}), "incomplete or damaged"),
        (json.dumps({**SETTINGS.to_dict(), "sampling": [3]}), "incomplete or damaged"),
        (json.dumps({**SETTINGS.to_dict(), "edited": None}), "incomplete or damaged"),
        (json.dumps({**SETTINGS.to_dict(), "seed": float("inf")}), "incomplete or damaged .*OverflowError"),
        (json.dumps({**SETTINGS.to_dict(), "batch": 4097}), "a batch of 4097; expected 1 to 4096"),
        (json.dumps({**SETTINGS.to_dict(), "threads": 0}), "0 threads; expected 1 to 1024"),
        (json.dumps({**SETTINGS.to_dict(), "threads": 10**9}), "1000000000 threads; expected 1 to 1024"),
        ("[" * 100_000, "no PNG with settings"),
        ('{"pictures": 3}', "a.png: is a contact sheet; like takes one picture"),
        ("3", "incomplete or damaged"),
    ],
)
def test_a_png_without_proper_settings_is_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    with pytest.raises(FarError, match=reason):
        read_metadata(png_with(tmp_path / "a.png", text))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(FarError, match="no PNG with settings, or cut short"):
        read_metadata(tmp_path / "a.png")
    with pytest.raises(FarError, match="no such file"):
        read_metadata(tmp_path / "b.png")
    with pytest.raises(FarError, match="no PNG with settings"):
        read_metadata(tmp_path)


def test_a_sheet_remembers_its_pictures_but_is_not_one(tmp_path: Path) -> None:
    save_sheet(tmp_path / "sheet.png", Image.new("RGB", (9, 9)), [SETTINGS, SETTINGS])
    record = json.loads(Image.open(tmp_path / "sheet.png").info[KEY])
    assert [PictureMetadata.from_dict(one) for one in record["pictures"]] == [SETTINGS, SETTINGS]
    with pytest.raises(FarError, match="a contact sheet of 2 pictures; like takes one"):
        read_metadata(tmp_path / "sheet.png")


@pytest.mark.parametrize(("side", "scale"), [(16, 8), (64, 2), (100, 2), (128, 1), (256, 1)])
def test_a_grid_shows_every_pixel_at_whole_magnification(side: int, scale: int) -> None:
    pixels = random_pixels(2, 3, side, side)
    sheet = np.asarray(picture_grid(pixels, ["", ""], ["", "", ""]))
    shown = side * scale
    assert sheet.shape == (2 * shown + 18, 3 * shown + 24, 3)
    for row in range(2):
        for column in range(3):
            top, left = 6 + row * (shown + 6), 6 + column * (shown + 6)
            tile = sheet[top : top + shown, left : left + shown]
            assert np.array_equal(tile, pixels[row, column].repeat(scale, axis=0).repeat(scale, axis=1))


def test_captions_stand_beside_the_pictures_and_long_ones_are_cut() -> None:
    pixels = np.zeros((1, 1, 128, 128, 3), np.uint8)
    plain, named = picture_grid(pixels, [""], [""]), picture_grid(pixels, ["7\nsnail"], ["seed 1"])
    assert named.width > plain.width and named.height > plain.height
    assert (np.asarray(named)[:, : named.width - plain.width] < 128).any()
    long = picture_grid(pixels, ["7\n" + "very long name " * 20], ["seed " + "9" * 40])
    width, height = grid_size(1, 1, 128, 128)
    assert long.width <= width and long.height <= height


def test_an_animation_is_lossless_loops_and_rests_on_its_last_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(pixels) for pixels in random_pixels(4, 24, 24)]
    save_animation(tmp_path / "a.webp", frames)
    with Image.open(tmp_path / "a.webp") as opened:
        assert (opened.info["loop"], opened.n_frames) == (0, 4)  # type: ignore[attr-defined]
        durations = []
        for frame, wanted in zip(ImageSequence.Iterator(opened), frames, strict=True):
            assert np.array_equal(np.asarray(frame.convert("RGB")), np.asarray(wanted))
            durations.append(frame.info["duration"])
    assert durations == [400, 400, 400, 2000]


def test_an_animation_that_webp_cannot_hold_is_refused_beforehand() -> None:
    check_animation(1, 60, 256, 256)
    with pytest.raises(FarError, match=f"larger than WebP's {WEBP_LIMIT} pixels.*with count"):
        check_animation(1, 64, 256, 256)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("golden retriever", "207-golden-retriever-seed-5.png"),
        ("", "207-seed-5.png"),
        ("../../etc/passwd", "207-etc-passwd-seed-5.png"),
        ("Käse", "207-k-se-seed-5.png"),
    ],
)
def test_file_names_hold_only_safe_characters(name: str, wanted: str) -> None:
    assert file_name(PictureMetadata.from_dict({**SETTINGS.to_dict(), "name": name, "seed": 5})) == wanted


def test_long_names_keep_label_and_seed() -> None:
    name = file_name(PictureMetadata.from_dict({**SETTINGS.to_dict(), "name": "word " * 100}))
    assert name.startswith("207-word-")
    assert name.endswith(f"-seed-{2**64 - 1}.png")
    assert len(name) < 256


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), whole_file(target) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    with whole_file(target) as aside:
        aside.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_a_failed_write_names_the_file(tmp_path: Path) -> None:
    reason = r"a\.txt: cannot be written \(No space left on device\)"
    with pytest.raises(FarError, match=reason), whole_file(tmp_path / "a.txt") as aside:
        aside.write_text("half")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_found_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FarError, match="is a file, a folder is needed; name another with --each"):
        check_folder(tmp_path / "file", "--each")
    with pytest.raises(FarError, match=r"cannot be written \(.*\); name a folder that can be with output"):
        check_folder(tmp_path / "file" / "below")
    with pytest.raises(FarError, match="/proc/x: cannot be written"):
        check_folder(Path("/proc/x"))
    with pytest.raises(FarError, match="exists and is no file"):
        check_file(tmp_path)
    check_file(tmp_path / "new" / "folder" / "a.png")
    assert (tmp_path / "new" / "folder").is_dir()
