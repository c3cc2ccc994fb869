"""Edits keep what they shall keep, to the last bit, draw the rest like any picture, and read pictures of all kinds."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from far_runtime.bundle import MANIFEST, manifest_checksum
from far_runtime.conditioning.subjects import Subject, null_subject
from far_runtime.engines.base import Engine
from far_runtime.errors import FarError
from far_runtime.images import reading as image_files
from far_runtime.images.edit import Edit, compose, in_paint, margins_text, out_paint, parse_margins
from far_runtime.images.reading import ImageFile, read_mask, read_picture
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.pyramid import kept_tokens, token_ranges
from far_runtime.sampling.reverse_diffusion import kept_last

SIZE, GRID = 16, 4  # of the tiny models
CELLS = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]], bool)  # kept ones
CONTINUOUS = ("bundle", "masked_bundle", "mar_bundle", "t2i_bundle")


def picture_of(seed: int, size: int = SIZE) -> Any:
    """A smooth picture of random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


IMAGE, KEEP = picture_of(0), CELLS.repeat(SIZE // GRID, axis=0).repeat(SIZE // GRID, axis=1)


class Recorder:
    """An engine that notes what its stages take and give."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name = engine, engine.name
        self.put, self.get, self.close = engine.put, engine.get, engine.close
        self.calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def run(self, stage: str, inputs: Any, constants: Any = None) -> dict[str, Any]:
        outputs = self.engine.run(stage, inputs, constants)
        inputs_read, outputs_read = (
            {name: self.get(value).copy() for name, value in part.items()} for part in (inputs, outputs)
        )
        self.calls.append((stage, inputs_read, outputs_read))
        return outputs

    def of(self, stage: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [(taken, given) for name, taken, given in self.calls if name == stage]


@pytest.fixture(scope="module", params=CONTINUOUS)
def editor(request: pytest.FixtureRequest, tiny: Any) -> Iterator[Pipeline]:
    """FAR unmasked and masked, MAR, FAR-T2I."""
    with Pipeline.from_bundle(getattr(tiny, request.param), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def var_editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A tiny VAR with random weights."""
    import torch

    from far_export.export import export_bundle
    from far_models.var import VAR, VARConfig
    from far_models.vq_vae import VQVAE, VQVAEConfig

    folder, scales = tmp_path_factory.mktemp("var"), (1, 2, 4)
    torch.manual_seed(0)
    var = VAR(VARConfig(patch_nums=scales, channels=6, vocabulary=20, classes=5, width=16, depth=2, heads=2))
    vae = VQVAE(VQVAEConfig(ch=8, multipliers=(1, 1, 2), blocks=1, channels=6, vocabulary=20, patch_nums=scales))
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.normal_(std=0.4)
    torch.save(var.state_dict(), folder / "var.pth")
    torch.save(vae.state_dict(), folder / "vae.pth")
    export_bundle(
        folder / "var.pth", folder / "vae.pth", folder / "bundle", overrides={"patch_nums": list(scales), "heads": 2}
    )
    with Pipeline.from_bundle(folder / "bundle", threads=1) as opened:
        yield opened


def recorded(pipeline: Pipeline) -> tuple[Pipeline, Recorder]:
    recorder = Recorder(pipeline.engine)
    return Pipeline(pipeline.bundle, recorder), recorder


def subject(pipeline: Pipeline) -> Subject:
    """A class, or a prompt."""
    return Subject(None, "owl") if pipeline.bundle.manifest.system == "far_t2i" else pipeline.subjects([3])[0]


def encoded(pipeline: Pipeline, image: Any) -> Any:
    return pipeline.engine.get(pipeline.engine.run("encode", {"pixels": pipeline.engine.put(image[None])})["latents"])


def relative_error(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def test_kept_latents_are_the_encoders_after_every_step(editor: Pipeline) -> None:
    generation = editor.edit([subject(editor)] * 2, [0, 1], IMAGE, KEEP, save_levels=True)
    image, kept = encoded(editor, IMAGE)[0], CELLS.reshape(-1)
    assert generation.level_latents is not None
    assert generation.level_latents.shape[:2] == (2, len(generation.step_names))
    for state in generation.level_latents.reshape(-1, GRID * GRID, image.shape[-1]):
        assert np.array_equal(state[kept], image[kept])
    for latents in generation.latents:
        assert np.array_equal(latents[kept], image[kept])
        assert (latents[~kept] != image[~kept]).any(axis=-1).all()
    assert np.abs(image).max() > 0.01


def test_seeds_subjects_and_the_kept_part_make_a_difference(editor: Pipeline) -> None:
    drawn = ~CELLS.reshape(-1)
    subjects = [subject(editor), subject(editor), null_subject(editor.bundle.manifest)]
    latents = editor.edit(subjects, [0, 1, 0], IMAGE, KEEP).latents[:, drawn]
    other = editor.edit(subjects, [0, 1, 0], picture_of(1), KEEP).latents[:, drawn]
    assert relative_error(latents[1], latents[0]) > 0.1
    assert relative_error(latents[2], latents[0]) > 1e-4
    assert relative_error(other[0], latents[0]) > 1e-4


def test_a_picture_of_a_batch_is_the_picture_alone(editor: Pipeline) -> None:
    subjects, seeds = [subject(editor), null_subject(editor.bundle.manifest), subject(editor)], [5, 6, 7]
    batch = editor.edit(subjects, seeds, IMAGE, KEEP, batch_size=2)
    assert [(one.batch, one.index) for one in batch.settings] == [(2, 0), (2, 1), (1, 0)]
    for i in (0, 2):
        alone = editor.edit(subjects[i : i + 1], seeds[i : i + 1], IMAGE, KEEP)
        assert relative_error(batch.latents[i], alone.latents[0]) < 1e-5
        assert np.abs(batch.images[i].astype(int) - alone.images[0]).max() <= 1


def test_an_edit_that_keeps_nothing_is_plain_generation(editor: Pipeline) -> None:
    arguments: tuple[Any, ...] = ([subject(editor)] * 2, [3, 4])
    edited = editor.edit(*arguments, IMAGE, np.zeros_like(KEEP))
    plain = editor.generate(*arguments)
    assert np.array_equal(edited.latents, plain.latents)
    assert np.array_equal(edited.images, plain.images)


def test_a_cell_with_one_changed_pixel_is_drawn_anew(editor: Pipeline) -> None:
    keep = np.ones_like(KEEP)
    keep[6, 11] = False  # in the cell (1, 2)
    latents, kept = editor.edit([subject(editor)], [0], IMAGE, keep).latents[0], encoded(editor, IMAGE)[0]
    assert np.flatnonzero((latents != kept).any(axis=-1)).tolist() == [1 * GRID + 2]


def test_without_a_subject_there_is_nothing_to_guide_to(editor: Pipeline) -> None:
    """Both halves would be the same: leaving one out changes nothing but the time it takes."""
    null = null_subject(editor.bundle.manifest)
    recording, recorder = recorded(editor)
    edited = recording.edit([null] * 2, [0, 1], IMAGE, np.zeros_like(KEEP))
    assert {one.sampling["guidance"] for one in edited.settings} == {1.0}
    assert {len(taken["condition"]) for taken, _ in recorder.of("denoise")} == {2}
    guided = editor.generate([null] * 2, [0, 1], guidance=3.0)
    assert relative_error(edited.latents, guided.latents) < 1e-5
    mixed = editor.edit([null, subject(editor)], [0, 1], IMAGE, KEEP)
    assert {one.sampling["guidance"] for one in mixed.settings} == {editor.bundle.manifest.default_settings["guidance"]}


def test_a_negative_prompt_is_something_to_lead_away_from(tiny: Any) -> None:
    with Pipeline.from_bundle(tiny.t2i_bundle, threads=1) as pipeline:
        null = null_subject(pipeline.bundle.manifest, "owl")
        assert pipeline.edit([null], [0], IMAGE, KEEP).settings[0].sampling["guidance"] > 1


def test_a_masked_model_sees_the_kept_tokens_first(tiny: Any) -> None:
    with Pipeline.from_bundle(tiny.masked_bundle, threads=1) as pipeline:
        recording, recorder = recorded(pipeline)
        recording.edit([1, 2], [0, 1], IMAGE, KEEP)
        seen = recorder.of("transformer")[1][0]["visible"]
        assert seen.shape == (2, 5)
        assert CELLS.reshape(-1)[seen].all()


@given(st.integers(0, 2**32), arrays.arrays(bool, (2, 3, 3)))
def test_kept_last_moves_tokens_and_no_more(seed: int, keep: Any) -> None:
    orders = np.random.default_rng(seed).permuted(np.tile(np.arange(9), (2, 1)), axis=1)
    for row, before, kept in zip(kept_last(orders, keep), orders, keep.reshape(2, 9), strict=True):
        free = 9 - kept.sum()
        assert row[:free].tolist() == [token for token in before if not kept[token]]
        assert row[free:].tolist() == [token for token in before if kept[token]]


def test_var_puts_the_pictures_own_tokens_back_at_every_scale(var_editor: Pipeline) -> None:
    recording, recorder = recorded(var_editor)
    generation = recording.edit([3, 4], [0, 1], IMAGE, KEEP)
    own = recorder.of("tokenize")[0][1]["embeddings"]
    keep = np.repeat(CELLS[None], 2, axis=0)
    placed = [given["latents_out"] for _, given in recorder.of("place")]
    assert len(placed) == 3
    for scale, (start, end), tokens in zip((1, 2, 4), token_ranges((1, 2, 4)), placed, strict=True):
        kept = kept_tokens(keep, scale)
        assert kept.any()
        assert np.array_equal(tokens[kept], own[:, start:end][kept])
    assert not np.array_equal(generation.images[0], generation.images[1])
    again = var_editor.edit([4], [1], IMAGE, KEEP)
    assert relative_error(again.latents[0], generation.latents[1]) < 1e-5


def test_var_without_a_class_runs_unguided(var_editor: Pipeline) -> None:
    recording, recorder = recorded(var_editor)
    null = null_subject(var_editor.bundle.manifest)
    generation = recording.edit([null, Subject(5)], [0, 1], IMAGE, KEEP)
    assert {one.sampling["guidance"] for one in generation.settings} == {0.0}
    assert {len(given["hidden"]) for _, given in recorder.of("transformer")} == {2}
    with pytest.raises(FarError, match="label 5: out of range"):
        var_editor.edit([5], [0], IMAGE, KEEP)


def test_settings_say_what_was_edited(pipeline: Pipeline) -> None:
    generation = pipeline.edit([1], [0], IMAGE, KEEP, edited={"image": "abc"})
    assert generation.settings[0].edited == {"image": "abc"}
    with pytest.raises(FarError, match="edited from another one"):
        pipeline.like(generation.settings[0])


@pytest.mark.parametrize(
    ("image", "keep", "reason"),
    [
        (IMAGE[:8], KEEP, "image of 16 x 8 pixels, mask of 16 x 16: this bundle edits pictures of 16 x 16"),
        (IMAGE, KEEP[:, :8], "mask of 8 x 16"),
        (IMAGE, np.ones_like(KEEP), "nothing to change"),
    ],
)
def test_edits_that_cannot_be(pipeline: Pipeline, image: Any, keep: Any, reason: str) -> None:
    with pytest.raises(FarError, match=reason):
        pipeline.edit([1], [0], image, keep)


def test_a_bundle_without_the_encoder(bundle_copy: Path) -> None:
    manifest = json.loads((bundle_copy / MANIFEST).read_text())
    manifest["graphs"] = [graph for graph in manifest["graphs"] if graph["stage"] != "encode"]
    manifest["sha256"] = manifest_checksum(manifest)
    (bundle_copy / MANIFEST).write_text(json.dumps(manifest))
    with Pipeline.from_bundle(bundle_copy, threads=1) as pipeline, pytest.raises(FarError, match="--no-editing"):
        pipeline.edit([1], [0], IMAGE, KEEP)


# Composition


@given(arrays.arrays(bool, (9, 9)), st.integers(0, 4))
def test_composition_keeps_the_picture_to_the_last_bit(change: Any, feather: int) -> None:
    original, drawn = picture_of(1, 9), np.stack([picture_of(2, 9), picture_of(3, 9)])
    composed = compose(drawn, Edit(original, change), feather)
    assert composed.shape == drawn.shape and composed.dtype == np.uint8
    assert (composed[:, ~change] == original[~change]).all()
    if feather == 0:
        assert np.array_equal(composed[:, change], drawn[:, change])


def test_feather_is_a_ramp_inside_of_the_change() -> None:
    change = np.zeros((9, 9), bool)
    change[:, 3:] = True
    composed = compose(np.full((1, 9, 9, 3), 240, np.uint8), Edit(np.zeros((9, 9, 3), np.uint8), change), 3)
    assert composed[0, 4, :, 0].tolist() == [0, 0, 0, 60, 120, 180, 240, 240, 240]
    assert (composed == composed[:, :1]).all()  # the picture's own border is no seam


# Fitting


def file_of(pixels: Any, name: str = "a.png") -> ImageFile:
    return ImageFile(Path(name), Image.fromarray(pixels), name)


def mask_of(change: Any) -> ImageFile:
    return file_of(np.where(change, 255, 0).astype(np.uint8), "mask.png")


def test_a_picture_of_the_right_size_is_taken_as_it_is() -> None:
    edit = in_paint(file_of(IMAGE), mask_of(~KEEP), SIZE)
    assert np.array_equal(edit.image, IMAGE)
    assert np.array_equal(edit.keep, KEEP)
    assert (edit.source, edit.notes) == ({"image": "a.png", "mask": "mask.png"}, ())


@pytest.mark.parametrize("tall", [False, True])
def test_picture_and_mask_are_cropped_to_the_same_middle(tall: bool) -> None:
    square = np.kron(picture_of(0, 8), np.ones((8, 8, 1), np.uint8))
    change = np.kron(np.random.default_rng(0).integers(0, 2, (8, 8)), np.ones((8, 8))).astype(bool)
    wide = np.concatenate([np.zeros((64, 20, 3), np.uint8), square, np.full((64, 20, 3), 255, np.uint8)], axis=1)
    wide_change = np.concatenate([np.ones((64, 20), bool), change, np.ones((64, 20), bool)], axis=1)
    if tall:
        square, change = square.swapaxes(0, 1), change.T
        wide, wide_change = wide.swapaxes(0, 1), wide_change.T
    edit = in_paint(file_of(wide), mask_of(wide_change), 32)
    expected = np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    middle = (
        (slice(None), slice(3, -3)) if not tall else (slice(3, -3), slice(None))
    )  # the border sees what lies beyond
    assert np.abs(edit.image[middle] - expected[middle]).max() <= 1
    assert np.array_equal(edit.change, change[::2, ::2])
    sizes = "64 x 104" if tall else "104 x 64"
    assert edit.notes == (f"a.png: {sizes} pixels, of which the middle 64 x 64 are used",)


def test_half_of_a_pixel_decides() -> None:
    change = np.zeros((8, 8), bool)
    change[0, :2] = change[4, 4] = True  # half of the pixel (0, 0), a quarter of the pixel (2, 2)
    assert np.argwhere(in_paint(file_of(picture_of(0, 8)), mask_of(change), 4).change).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.zeros((16, 12), np.uint8), "mask.png: 12 x 16 pixels, a.png has 16 x 16"),
        (np.full((16, 16), 127, np.uint8), "mask.png: nothing to change: no pixel is white"),
        (np.eye(16, dtype=np.uint8) * 255, "nothing to change at 4 x 4 pixels"),
    ],
)
def test_masks_that_cannot_be(mask: Any, reason: str) -> None:
    with pytest.raises(FarError, match=reason):
        in_paint(file_of(IMAGE), file_of(mask, "mask.png"), 4)


def test_outpainting_shrinks_the_picture_into_the_rest() -> None:
    edit = out_paint(file_of(picture_of(0, 48)), {"left": 2, "top": 4, "bottom": 5}, SIZE)
    rows, columns = slice(4, 11), slice(2, 16)
    assert edit.image.shape == (SIZE, SIZE, 3)
    assert not edit.change[rows, columns].any()
    assert edit.change.sum() == SIZE * SIZE - 7 * 14
    middle = Image.fromarray(picture_of(0, 48)[12:36])  # 14 x 7 pixels have the shape of its middle half
    shrunk = np.asarray(middle.resize((14, 7), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(edit.image[rows, columns] - shrunk)[1:-1].max() <= 2  # the border sees what lies beyond
    assert edit.notes == ("a.png: 48 x 48 pixels, of which the middle 48 x 24 are used",)
    assert edit.source == {"image": "a.png", "outpaint": "left=2,top=4,bottom=5"}
    assert np.array_equal(edit.image[:4, columns], edit.image[7:3:-1, columns])  # what the encoder sees in the margins
    assert np.array_equal(edit.image[:, :2], edit.image[:, 3:1:-1])


@pytest.mark.parametrize("margins", [{"left": 16}, {"left": 9, "right": 8}, {"top": 999}])
def test_margins_that_leave_no_picture(margins: dict[str, int]) -> None:
    with pytest.raises(FarError, match="leaves no picture of 16 x 16 pixels; use smaller margins"):
        out_paint(file_of(IMAGE), margins, SIZE)


@given(st.dictionaries(st.sampled_from(["left", "right", "top", "bottom"]), st.integers(1, 500), min_size=1))
def test_margins_are_read_as_they_are_written(margins: dict[str, int]) -> None:
    assert parse_margins(margins_text(margins)) == margins
    assert parse_margins(margins_text(margins).replace("=", " = ").replace(",", " , ")) == margins


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "side ''; expected left, right, top, bottom"),
        ("16", "side '16'"),
        ("middle=3", "side 'middle'"),
        ("left=3,", "side ''"),
        ("left=3,left=4", "left is there twice"),
        ("left=-3", "left=-3; expected a number of pixels"),
        ("left=1.5", "left=1.5"),
        ("left=", "left=; expected a number"),
        ("left=²", "left=²"),
        ("left=0,top=0", "adds nothing"),
    ],
)
def test_margins_that_cannot_be(text: str, reason: str) -> None:
    with pytest.raises(FarError, match=reason.replace("²", ".")):
        parse_margins(text)


# Files


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_transparent_parts_are_white_in_pictures_and_black_in_masks(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0, 255], [255, 255, 255, 0], [0, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(pixels))
    shown = np.asarray(read_picture(path).image)[0]
    assert shown[:3].tolist() == [[255, 0, 0], [255, 255, 255], [255, 255, 255]]
    assert np.abs(shown[3].astype(int) - 127).max() <= 1
    assert np.asarray(read_mask(path).image)[0, 1:].tolist() == [0, 0, 0]


def test_modes_that_pillow_reads(tmp_path: Path) -> None:
    grey = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
    image = Image.fromarray(grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    palette = image.convert("P")
    clear = image.convert("RGB")
    files = [
        saved(tmp_path / "l.png", image),
        saved(tmp_path / "rgb.png", image.convert("RGB")),
        saved(tmp_path / "la.png", image.convert("LA")),
        saved(tmp_path / "16.png", deep),
        saved(tmp_path / "16.tif", deep),
        saved(tmp_path / "32.tif", Image.fromarray(grey.astype(np.int32))),
        saved(tmp_path / "f.tif", Image.fromarray(grey.astype(np.float32))),
        saved(tmp_path / "p.png", palette),
        saved(tmp_path / "p.gif", palette),
        saved(tmp_path / "rgb.webp", clear, lossless=True),
        saved(tmp_path / "cmyk.tif", clear.convert("CMYK")),
    ]
    for path in files:
        shown = np.asarray(read_picture(path).image)
        assert shown.shape == (16, 16, 3), path
        assert np.array_equal(shown, np.repeat(grey[..., None], 3, axis=2)), path
        assert np.array_equal(np.asarray(read_mask(path).image), grey), path
    bits = saved(tmp_path / "1.png", image.point(lambda value: 255 * (value > 99), "1"))
    assert np.array_equal(np.asarray(read_mask(bits).image), np.where(grey > 99, 255, 0))
    key = saved(tmp_path / "key.png", clear, transparency=(240, 240, 240))
    assert np.array_equal(np.asarray(read_picture(key).image)[..., 0], np.where(grey == 240, 255, grey))


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right by a quarter to be shown
    path = saved(tmp_path / "a.png", image, exif=exif)
    shown = np.asarray(read_picture(path).image)
    assert np.array_equal(shown, np.rot90(np.asarray(image), -1))


def png_of_size(width: int, height: int) -> bytes:
    """The beginning of a PNG that says it is that large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    )


def damaged() -> dict[str, bytes]:
    whole = io.BytesIO()
    Image.fromarray(picture_of(0, 64)).save(whole, "PNG")
    return {
        "cut.png": whole.getvalue()[:700],
        "text.png": b"no picture at all",
        "empty.png": b"",
        "bomb.png": png_of_size(60000, 60000),
        "large.png": png_of_size(8001, 8000),
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut.png", r"cannot be read as a picture \(.*truncated"),
        ("text.png", r"cannot be read as a picture \(no picture of a known kind\); image takes"),
        ("empty.png", "no picture of a known kind"),
        ("bomb.png", "more than 64 million pixels; give image a smaller picture"),
        ("large.png", "more than 64 million pixels"),
        ("nothing.png", "no such file; image takes"),
        (".", r"cannot be read \(Is a directory\)"),
    ],
)
def test_files_that_are_no_pictures(tmp_path: Path, name: str, reason: str) -> None:
    for file, data in damaged().items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(FarError, match=reason):
        read_picture(tmp_path / name)


@given(st.integers(0, 2**32))
def test_damaged_files_never_break_out(seed: int) -> None:
    random = np.random.default_rng(seed)
    whole = io.BytesIO()
    Image.fromarray(picture_of(0, 8)).save(whole, random.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
    data = np.frombuffer(whole.getvalue(), np.uint8).copy()
    data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"far-damaged-{seed}"
    try:
        path.write_bytes(data.tobytes())
        read_picture(path)
    except FarError as error:
        assert str(path) in str(error)
    finally:
        path.unlink(missing_ok=True)


def test_files_larger_than_any_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_BYTES", 1 << 20)
    (tmp_path / "a.png").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(FarError, match="larger than 1 MB"):
        read_picture(tmp_path / "a.png")
