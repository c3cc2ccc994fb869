"""The emoji set from tiny made-up packages: nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import emoji_sources
import prepare_emoji
from emoji_choice import held_out_pairs, read_curated
from emoji_match import genderless, iconify_aliases, name_table, read_emoji, read_odd_names
from emoji_raster import contact_sheet, draw_svg
from emoji_sources import hex_key, slug
from far_runtime.errors import FarError

pytest.importorskip("resvg_py", reason="the extra 'train' draws SVG")

# Two animals, a heart, a runner with a gendered form and a flag: hexcode, label, group, subgroup.
ROWS = [
    ("1F436", "dog face", 3, 34),
    ("1F98A", "fox", 3, 34),
    ("2764", "red heart", 0, 14),
    ("1F3C3", "person running", 1, 27),
    ("1F3C3-200D-2642-FE0F", "man running", 1, 27),
    ("1F3C1", "chequered flag", 9, 97),
]
SQUARES = {"dog-face": "#ff0000", "fox": "#00ff00", "red-heart": "#0000ff"}


def emojibase_files() -> dict[str, bytes]:
    data = [
        {"hexcode": code, "label": label, "emoji": "x", "order": order, "group": group, "subgroup": subgroup}
        for order, (code, label, group, subgroup) in enumerate(ROWS)
    ]
    groups = {"groups": {str(n): f"group {n}" for n in range(10)}, "subgroups": {"14": "heart", "27": "sport"}}
    groups["subgroups"]["34"] = "mammal"
    return {"en/data.json": json.dumps(data).encode(), "meta/groups.json": json.dumps(groups).encode()}


def iconify_files(colours: dict[str, str], chars: dict[str, str] | None = None, **more: Any) -> dict[str, bytes]:
    """Each icon is a square of one colour in the left half of a 32 x 32 view box."""
    icons = {name: {"body": f'<path fill="{colour}" d="M0 0h16v32H0z"/>'} for name, colour in colours.items()}
    whole = {"prefix": "x", "width": 32, "height": 32, "icons": icons, **more}
    return {"icons.json": json.dumps(whole).encode(), "chars.json": json.dumps(chars or {}).encode()}


def webp(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", (256, 256), colour).save(stream, "webp", lossless=True)
    return stream.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> str:
    """Write a tarball as npm does; its integrity."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a made-up version of every package, and no npm to fall back on."""
    folder = tmp_path / "npm"
    folder.mkdir()
    chars = {"1f436": "dog-face", "1f98a": "fox", "2764": "red-heart"}
    runners = {"1f3c3": "person-running", "1f3c3-200d-2642": "man-running"}
    contents = {
        "noto": iconify_files(
            SQUARES | {"person-running": "#111111", "man-running": "#222222"},
            chars | runners,
            aliases={"hound": {"parent": "dog-face"}},
        ),
        # known by another package's alias, by CLDR label and by Unicode name
        "noto-v1": iconify_files({"hound": "#ff0000", "fox": "#00ff00", "heavy-black-heart": "#0000ff"}),
        "twemoji": iconify_files(SQUARES, chars),
        "fluent-flat": iconify_files(SQUARES, chars),
        "fluent-3d": {"assets/1f436.webp": webp("red"), "assets/2764-fe0f.webp": webp("blue"), "README.md": b"x"},
        "emojione": iconify_files(
            SQUARES, None, aliases={"person-running": {"parent": "fox", "hFlip": True}, "bad": {"parent": "gone"}}
        ),
        "fxemoji": iconify_files({"dogface": "#ff0000", "foxface": "#00ff00", "redheart": "#0000ff"}),
    }
    packages = {}
    for style, package in emoji_sources.STYLES.items():
        packages[style] = replace(package, integrity=pack(folder / package.tarball, contents[style]))
    base = prepare_emoji.EMOJIBASE
    monkeypatch.setattr(prepare_emoji, "STYLES", packages)
    monkeypatch.setattr(
        prepare_emoji, "EMOJIBASE", replace(base, integrity=pack(folder / base.tarball, emojibase_files()))
    )
    here = tmp_path / "lists"
    here.mkdir()
    (here / "emoji_concepts.txt").write_text("# best first\n2764 x red heart\n1f436 x dog face\n", encoding="utf-8")
    (here / "emoji_names.txt").write_text("fxemoji redheart -\nfxemoji foxface 1f98a\n", encoding="utf-8")
    monkeypatch.setattr(prepare_emoji, "HERE", here)
    monkeypatch.setattr(emoji_sources.shutil, "which", lambda name: None)
    return folder


def run(cache: Path, *options: str) -> tuple[int, Path]:
    output = cache.parent / "set"
    return prepare_emoji.main(
        ["-o", str(output), "--cache", str(cache), "--size", "16", "--jobs", "1", *options]
    ), output


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_set_has_curated_classes_first(cache: Path) -> None:
    code, folder = run(cache, "--concepts", "3", "--holdout", "0")
    assert code == 0
    images, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    styles = np.load(folder / "styles.npy")
    assert load(folder, "names.json") == ["red heart", "dog face", "fox"]
    assert images.dtype == np.uint8 and labels.dtype == styles.dtype == np.int64
    # heart: all but the fxemoji one that the list of names leaves out; dog: all; fox: all but 3d
    assert np.bincount(labels).tolist() == [6, 7, 6]
    assert images.shape == (19, 16, 16, 3)
    assert styles[labels == 2].tolist() == [0, 1, 2, 3, 5, 6]
    for label, channel in ((0, 2), (1, 0), (2, 1)):
        # the drawing's left half in its colour, the rest white
        for picture, style in zip(images[labels == label], styles[labels == label], strict=True):
            expected = np.zeros(3)
            expected[channel] = 255
            np.testing.assert_allclose(picture[8, 3], expected, atol=6)
            np.testing.assert_allclose(picture[8, 13], expected if style == 4 else [255] * 3, atol=6)


def test_all_keeps_gendered_forms_and_mirrors(cache: Path) -> None:
    code, folder = run(cache, "--concepts", "all", "--holdout", "0")
    assert code == 0
    names, concepts = load(folder, "names.json"), load(folder, "concepts.json")
    assert names == ["dog face", "fox", "red heart", "person running", "man running"]
    assert [concept["base"] for concept in concepts] == [None, None, None, None, "1f3c3"]
    assert [concept["subgroup"] for concept in concepts] == ["mammal", "mammal", "heart", "sport", "sport"]
    labels, styles = np.load(folder / "labels.npy"), np.load(folder / "styles.npy")
    mirrored = np.load(folder / "images.npy")[(labels == 3) & (styles == 5)][0]
    np.testing.assert_allclose(mirrored[8, 3], [255] * 3, atol=6)
    np.testing.assert_allclose(mirrored[8, 13], [0, 255, 0], atol=6)


def test_meta_and_split_describe_the_set(cache: Path) -> None:
    code, folder = run(cache, "--concepts", "3", "--holdout", "1")
    assert code == 0
    meta, split = load(folder, "meta.json"), load(folder, "split.json")
    images = np.load(folder / "images.npy")
    assert meta["images_sha256"] == hashlib.sha256(images.tobytes()).hexdigest()
    assert meta["pictures"] == len(images) == sum(meta["pictures_per_style"].values())
    assert sorted(split["train"] + split["held_out"]) == list(range(len(images)))
    # one concept in one: exactly one picture of every class
    assert sorted(np.load(folder / "labels.npy")[split["held_out"]].tolist()) == [0, 1, 2]
    assert meta["held_out"] == 3 and meta["train"] == len(images) - 3
    assert [entry["style"] for entry in load(folder, "styles.json")] == list(emoji_sources.STYLES)
    assert Image.open(folder / "sheet.png").width > 7 * 16


def test_same_options_same_bytes(cache: Path) -> None:
    folders = []
    for name in ("one", "two"):
        output = cache.parent / name
        assert prepare_emoji.main(["-o", str(output), "--cache", str(cache), "--concepts", "all", "--jobs", "2"]) == 0
        folders.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert folders[0] == folders[1]


def test_larger_set_holds_out_the_same_pictures() -> None:
    keys = [str(number) for number in range(200)]
    styles = list(emoji_sources.STYLES)
    large = held_out_pairs([(key, style) for key in keys for style in styles], 8)
    small = held_out_pairs([(key, style) for key in keys[:50] for style in styles], 8)
    assert 10 < len(large) < 45
    assert small == {pair for pair in large if int(pair[0]) < 50}
    assert len({key for key, _ in large}) == len(large)
    few = [(key, style) for key in keys for style in styles[:4]]
    assert held_out_pairs(few, 1) == set()


def test_styles_keep_their_numbers(cache: Path) -> None:
    code, folder = run(cache, "--concepts", "all", "--styles", "emojione", "noto")
    assert code == 0
    assert set(np.load(folder / "styles.npy").tolist()) == {0, 5}


def test_changed_tarball_is_refused(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = cache / emoji_sources.STYLES["twemoji"].tarball
    target.write_bytes(target.read_bytes() + b"\0")
    code, folder = run(cache, "--concepts", "3")
    assert code == 2 and not folder.exists()
    message = capsys.readouterr().err
    assert str(target) in message and "sha512" in message and message.count("\n") == 1


def test_missing_npm_says_what_to_do(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = cache / emoji_sources.STYLES["fxemoji"].tarball
    target.unlink()
    code, _ = run(cache, "--concepts", "3")
    assert code == 2
    assert "npm pack @iconify-json/fxemoji@1.2.2" in capsys.readouterr().err


def test_npm_failure_is_reported_without_its_noise(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    npm = tmp_path / "npm-fake"
    npm.write_text("#!/bin/sh\necho 'npm warn old' >&2\necho 'npm error code E404' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(emoji_sources.shutil, "which", lambda name: str(npm))
    (cache / emoji_sources.STYLES["fxemoji"].tarball).unlink()
    code, _ = run(cache, "--concepts", "3")
    message = capsys.readouterr().err
    assert code == 2 and "code E404" in message and "npm warn" not in message


def test_fetch_keeps_what_npm_brings_only_if_it_is_right(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = prepare_emoji.STYLES["noto"]
    original = (cache / package.tarball).read_bytes()
    store = tmp_path / "store"
    npm = tmp_path / "npm-fake"
    npm.write_text(f'#!/bin/sh\ncp {store} "$4/{package.tarball}"\n')
    npm.chmod(0o755)
    monkeypatch.setattr(emoji_sources.shutil, "which", lambda name: str(npm))
    empty = tmp_path / "empty"
    store.write_bytes(b"something else")
    with pytest.raises(FarError, match=r"is not @iconify-json/noto@1\.2\.9"):
        emoji_sources.fetch(package, empty)
    assert list(empty.iterdir()) == []
    store.write_bytes(original)
    assert emoji_sources.fetch(package, empty).read_bytes() == original
    assert [path.name for path in empty.iterdir()] == [package.tarball]


def test_failed_build_leaves_the_old_set(cache: Path) -> None:
    assert run(cache, "--concepts", "3")[0] == 0
    folder = cache.parent / "set"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(cache, "--concepts", "4")[0] == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in cache.parent.iterdir()) == ["lists", "npm", "set"]
    assert run(cache, "--concepts", "2")[0] == 0
    assert load(folder, "meta.json")["concepts"] == 2


def test_too_many_concepts_says_how_many_there_are(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cache, "--concepts", "4")[0] == 2
    assert "3 concepts have at least 6 styles; expected 4" in capsys.readouterr().err


def test_other_folder_is_not_overwritten(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = cache.parent / "set"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    assert run(cache)[0] == 2
    assert "no picture set" in capsys.readouterr().err
    assert (output / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--concepts", "some"], "--concepts"),
        (["--concepts", "0"], "--concepts"),
        (["--size", "512"], "--size"),
        (["--holdout", "-1"], "--holdout"),
        (["--jobs", "0"], "--jobs"),
        (["--styles", "apple"], "--styles"),
    ],
)
def test_bad_options(cache: Path, options: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(cache, *options)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


def test_broken_drawing_names_itself(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = prepare_emoji.STYLES["twemoji"]
    files = iconify_files({"fox": "#00ff00"}, {"1f98a": "fox"})
    files["icons.json"] = files["icons.json"].replace(b"<path", b"<path <")
    changed = replace(package, integrity=pack(cache / package.tarball, files))
    monkeypatch.setitem(prepare_emoji.STYLES, "twemoji", changed)
    assert run(cache, "--concepts", "all")[0] == 2
    assert "twemoji 1f98a: the drawing cannot be read" in capsys.readouterr().err


def test_blank_drawing_is_left_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = prepare_emoji.STYLES["twemoji"]
    files = iconify_files({"fox": "#ffffff", "dog-face": "#ff0000"}, {"1f98a": "fox", "1f436": "dog-face"})
    changed = replace(package, integrity=pack(cache / package.tarball, files))
    monkeypatch.setitem(prepare_emoji.STYLES, "twemoji", changed)
    code, folder = run(cache, "--concepts", "all", "--styles", "twemoji")
    assert code == 0
    assert load(folder, "names.json") == ["dog face"]
    assert load(folder, "meta.json")["blank_left_out"] == 1


def test_repository_lists_are_sound(tmp_path: Path) -> None:
    folder = Path(prepare_emoji.__file__).parent
    odd = read_odd_names(folder / "emoji_names.txt")
    assert set(odd) <= set(emoji_sources.STYLES)
    lines = (folder / "emoji_concepts.txt").read_text(encoding="utf-8").splitlines()
    curated = [line.split() for line in lines if not line.startswith("#")]
    assert len(curated) >= 256
    for code, char, *label in curated:
        assert hex_key("-".join(f"{ord(letter):x}" for letter in char)) == hex_key(code) and label
    with pytest.raises(FarError, match="unknown or repeated: 1f436"):
        (tmp_path / "list").write_text("1f436\n")
        read_curated(tmp_path / "list", {})


def test_odd_names_reject_a_malformed_line(tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_text("fxemoji cat\n")
    with pytest.raises(FarError, match=":1: expected 'style name hexcode'"):
        read_odd_names(path)


def test_names_and_codes() -> None:
    assert hex_key("2764-FE0F-200D-1F525") == "2764-200d-1f525"
    assert hex_key("0023-fe0f-20e3") == "23-20e3"
    assert slug("Smiling Face with Heart-Eyes") == slug("smiling-face-with-heart-eyes")
    assert genderless("1f3c3-200d-2642", {"1f3c3"}) == "1f3c3"
    assert genderless("1f468-200d-1f3a4", {"1f9d1-200d-1f3a4"}) == "1f9d1-200d-1f3a4"
    assert genderless("1f3c3-200d-2642", set()) is None
    assert genderless("2764", {"2764"}) is None


def test_unicode_and_label_may_disagree(tmp_path: Path) -> None:
    # CLDR calls U+1F604 what Unicode calls U+1F601
    files = emojibase_files()
    row = {"emoji": "x", "group": 0, "subgroup": 14}
    files["en/data.json"] = json.dumps(
        [
            {"hexcode": "1F604", "label": "grinning face with smiling eyes", "order": 0, **row},
            {"hexcode": "1F601", "label": "beaming face with smiling eyes", "order": 1, **row},
        ]
    ).encode()
    pack(tmp_path / "base.tgz", files)
    emoji = read_emoji(tmp_path / "base.tgz")
    name = "grinningfacewithsmilingeyes"
    assert name_table(emoji, "label")[name] == "1f604"
    assert name_table(emoji, "unicode")[name] == "1f601"


def test_aliases_follow_chains_and_mirror_twice() -> None:
    aliases = {
        "b": {"parent": "a", "hFlip": True},
        "c": {"parent": "b", "hFlip": True},
        "d": {"parent": "a", "rotate": 1},
        "e": {"parent": "f"},
        "f": {"parent": "e"},
    }
    assert iconify_aliases({"icons": {"a": {}}, "aliases": aliases}) == {"b": ("a", True), "c": ("a", False)}


def test_svg_keeps_proportions() -> None:
    text = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 20"><path fill="red" d="M0 0h10v20H0z"/></svg>'
    picture = np.asarray(draw_svg(text, 40))
    assert picture.shape == (40, 40, 4)
    assert (picture[:, 10:30, 3] == 255).all() and (picture[:, :10, 3] == 0).all() and (picture[:, 30:, 3] == 0).all()


def test_contact_sheet_shows_every_picture() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2], np.int64)
    images = np.stack([np.full((8, 8, 3), 10 * (n + 1), np.uint8) for n in range(6)])
    sheet = np.asarray(contact_sheet(images, labels))
    for n in range(6):
        assert (sheet == 10 * (n + 1)).all(-1).sum() == 64
