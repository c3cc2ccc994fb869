"""`far edit` from the outside: what it writes, what stays as it was, one clear line for everything that is wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from far_runtime.bundle import MANIFEST, manifest_checksum
from far_runtime.images.writing import KEY, read_metadata
from far_runtime.pipeline import Pipeline

CHANGE = (slice(4, 12), slice(6, 16))


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


def refused(result: Any, reason: str) -> None:
    """One line on stderr that holds the reason, nothing on stdout, and exit code 2."""
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert reason in result.err


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A picture of the bundle's size and its mask, a smaller mask, an empty one, and files that are no pictures."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[CHANGE] = 255
    Image.fromarray(image).save(tmp_path / "in.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:8]).save(tmp_path / "small.png")
    Image.fromarray(mask * 0).save(tmp_path / "black.png")
    Image.fromarray(mask | 255).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "in.png").read_bytes()[:200])
    return tmp_path


@pytest.mark.parametrize("bundle", ["bundle", "masked_bundle", "mar_bundle", "t2i_bundle"])
def test_outside_of_the_mask_nothing_changes(far: Any, tiny: Any, inputs: Path, bundle: str) -> None:
    subject = ("--prompt", "owl") if bundle == "t2i_bundle" else ("--label", 3)
    for arguments in ((), subject):
        result = far("edit", getattr(tiny, bundle), "--image", "in.png", "--mask", "mask.png", *arguments, "--seed", 7,
                     "--count", 2, "--each", "each", "--feather", 1, "--threads", 1)  # fmt: skip
        assert result.code == 0, result.err
        assert result.err == ""
        assert "31% of the picture redrawn" in result.out
    before, kept = pixels(inputs / "in.png"), np.ones((16, 16), bool)
    kept[CHANGE] = False
    made = sorted((inputs / "each").iterdir())
    assert len(made) == 4
    for path in made:
        assert np.array_equal(pixels(path)[kept], before[kept])
        assert (pixels(path) != before)[~kept].mean() > 0.5
    assert len({pixels(path).tobytes() for path in made}) == 4
    record = json.loads(Image.open(inputs / "out.png").info[KEY])
    assert [one["seed"] for one in record["pictures"]] == [7, 8]


def test_pictures_say_what_they_were_edited_from(far: Any, tiny: Any, inputs: Path) -> None:
    of = {name: hashlib.sha256((inputs / f"{name}.png").read_bytes()).hexdigest() for name in ("in", "mask")}
    far("edit", tiny.bundle, "--image", "in.png", "--mask", "mask.png", "--label", "tabby", "-q")
    settings = read_metadata(inputs / "out.png")
    assert (settings.label, settings.name, settings.sampling["guidance"]) == (6, "tabby", 3.0)
    assert settings.edited == {"image": of["in"], "mask": of["mask"], "feather": "1"}
    far("edit", tiny.bundle, "--image", "in.png", "--outpaint", "top=3,left=4", "--feather", 0, "--each", "each", "-q")
    settings = read_metadata(inputs / "each" / "10-no-class-seed-0.png")
    assert (settings.label, settings.name, settings.sampling["guidance"]) == (10, "no class", 1.0)
    assert settings.edited == {"image": of["in"], "outpaint": "left=4,top=3", "feather": "0"}
    inner = Image.open(inputs / "in.png").crop((0, 0, 16, 16))
    assert pixels(inputs / "out.png")[3:, 4:].shape == (13, 12, 3)
    cut = inner.resize(
        (12, 13), Image.Resampling.LANCZOS, box=((16 - 16 * 12 / 13) / 2, 0, (16 + 16 * 12 / 13) / 2, 16)
    )
    assert np.abs(pixels(inputs / "out.png")[3:, 4:].astype(int) - np.asarray(cut)).max() <= 1


def test_the_same_command_draws_the_same_picture(far: Any, tiny: Any, inputs: Path) -> None:
    for name in ("a.png", "b.png"):
        result = far("edit", tiny.bundle, "--image", "in.png", "--mask", "mask.png", "-o", name, "--threads", 1)
        assert result.out.startswith(f"{name}: the picture\n")
    assert (inputs / "a.png").read_bytes() == (inputs / "b.png").read_bytes()


def test_a_white_mask_is_plain_generation(far: Any, tiny: Any, inputs: Path) -> None:
    far("edit", tiny.bundle, "--image", "in.png", "--mask", "white.png", "--label", 3, "-o", "edited.png")
    far("generate", tiny.bundle, "--label", 3, "-o", "plain.png")
    assert np.array_equal(pixels(inputs / "edited.png"), pixels(inputs / "plain.png"))


def test_sampling_settings_count(far: Any, tiny: Any, inputs: Path) -> None:
    far("edit", tiny.bundle, "--image", "in.png", "--mask", "mask.png", "--label", 3, "--steps", "2:4", "--guidance", 2,
        "--levels", "0,1,3", "-q")  # fmt: skip
    sampling = read_metadata(inputs / "out.png").sampling
    assert (sampling["levels"], sampling["guidance"]) == ([0, 1, 3], 2.0)


def test_a_larger_picture_is_cropped_with_a_word(far: Any, tiny: Any, inputs: Path) -> None:
    for name in ("in", "mask"):
        Image.open(inputs / f"{name}.png").resize((80, 64), Image.Resampling.NEAREST).save(inputs / f"{name}.png")
    result = far("edit", tiny.bundle, "--image", "in.png", "--mask", "mask.png")
    assert result.out.startswith("in.png: 80 x 64 pixels, of which the middle 64 x 64 are used\n")
    assert pixels(inputs / "out.png").shape == (16, 16, 3)


def test_edited_pictures_are_not_repeated_by_generate(far: Any, tiny: Any, inputs: Path) -> None:
    for arguments in ((), ("--label", 3)):
        far("edit", tiny.bundle, "--image", "in.png", "--mask", "mask.png", *arguments, "-o", "edited.png", "-q")
        refused(far("generate", tiny.bundle, "--like", "edited.png"), "repeat it with far edit and the same files")
        assert not (inputs / "out.png").exists()


def test_a_prompt_that_is_too_long_is_warned_of(far: Any, tiny: Any, inputs: Path) -> None:
    result = far("edit", tiny.t2i_bundle, "--image", "in.png", "--mask", "mask.png", "--prompt", "owl " * 20)
    assert result.code == 0
    assert result.err.startswith("warning: prompt ") and result.err.count("\n") == 1


MASKED = ("--image", "in.png", "--mask", "mask.png")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--mask", "mask.png"], "Missing option '--image'"),
        (["--image", "in.png"], "use one; neither is given"),
        ([*MASKED, "--outpaint", "left=3"], "use one; both are given"),
        (["--image", "nothing.png", "--mask", "mask.png"], "nothing.png: no such file; --image takes"),
        (["--image", "in.png", "--mask", "nothing.png"], "nothing.png: no such file; --mask takes"),
        (["--image", "text.png", "--mask", "mask.png"], "text.png: cannot be read as a picture"),
        (["--image", "in.png", "--mask", "text.png"], "text.png: cannot be read as a picture"),
        (["--image", "cut.png", "--mask", "mask.png"], "cut.png: cannot be read as a picture"),
        (["--image", ".", "--mask", "mask.png"], ".: cannot be read (Is a directory)"),
        (["--image", "in.png", "--mask", "small.png"], "small.png: 16 x 8 pixels, in.png has 16 x 16"),
        (["--image", "in.png", "--mask", "black.png"], "black.png: nothing to change"),
        (["--image", "in.png", "--outpaint", "left=16"], "--outpaint left=16: leaves no picture"),
        (["--image", "in.png", "--outpaint", "up=3"], "side 'up'; expected left, right, top, bottom"),
        (["--image", "in.png", "--outpaint", "left=-3"], "left=-3; expected a number of pixels"),
        (["--image", "in.png", "--outpaint", "left=0"], "adds nothing to the picture"),
        ([*MASKED, "--feather", "-1"], "Invalid value for '--feather'"),
        ([*MASKED, "--label", "10"], "label 10: out of range; this bundle has classes 0 to 9"),
        ([*MASKED, "--label", "no class"], "label 'no class': no class of that name"),
        ([*MASKED, "--label", "dragonfry"], "the closest are 4 dragonfly"),
        ([*MASKED, "--prompt", "an owl"], "draws from class labels, not from text; use --label in place of --prompt"),
        ([*MASKED, "--negative", "an owl"], "use --label in place of --negative"),
        ([*MASKED, "--guidance", "2"], "--guidance leads towards a --label or --prompt"),
        ([*MASKED, "--iterations", "2"], "--iterations: a far model has no such setting"),
        ([*MASKED, "--seed", "-1"], "seed -1: expected 0 to"),
        ([*MASKED, "--engine", "tensorflow"], "engine 'tensorflow': unknown"),
        ([*MASKED, "-o", "in.png"], "in.png: -o would replace the file given with --image"),
        ([*MASKED, "-o", "./mask.png"], "mask.png: -o would replace the file given with --mask"),
        ([*MASKED, "-o", "out.jpg"], "out.jpg: is written as PNG; use -o out.png"),
        ([*MASKED, "-o", "text.png/a.png"], "text.png: is a file, a folder is needed"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    far: Any, tiny: Any, inputs: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str
) -> None:
    def sampled(*_: object, **__: object) -> None:
        raise AssertionError("sampling has begun")

    if "--seed" not in arguments and "--iterations" not in arguments:
        monkeypatch.setattr(Pipeline, "edit", sampled)
    before = {path.name: path.read_bytes() for path in inputs.iterdir()}
    refused(far("edit", tiny.bundle, *arguments), reason)
    assert {path.name: path.read_bytes() for path in inputs.iterdir()} == before


def test_single_pictures_never_replace_the_inputs(far: Any, tiny: Any, inputs: Path) -> None:
    (inputs / "in.png").rename(inputs / "3-crane-seed-0.png")
    arguments = ["--image", "3-crane-seed-0.png", "--mask", "mask.png", "--label", 3, "--each", "."]
    refused(far("edit", tiny.bundle, *arguments), "--each would replace the file given with --image")
    refused(
        far("edit", tiny.bundle, *arguments[:4], "--label", 1, "--each", ".", "-o", "1-red-fox-seed-0.png"),
        "-o and --each would both write it",
    )


def test_no_bundle_and_a_bundle_that_cannot_edit(far: Any, inputs: Path, bundle_copy: Path) -> None:
    refused(far("edit", "nowhere", *MASKED), "nowhere: no such bundle")
    manifest = json.loads((bundle_copy / MANIFEST).read_text())
    manifest["graphs"] = [graph for graph in manifest["graphs"] if graph["stage"] not in ("encode", "place")]
    manifest["sha256"] = manifest_checksum(manifest)
    (bundle_copy / MANIFEST).write_text(json.dumps(manifest))
    refused(
        far("edit", bundle_copy, *MASKED), "has no encode stage, so it cannot edit; export it again without --no-ed"
    )


def test_a_text_bundle_takes_no_label(far: Any, tiny: Any, inputs: Path) -> None:
    refused(far("edit", tiny.t2i_bundle, *MASKED, "--label", 1), "use --prompt TEXT in place of --label")
