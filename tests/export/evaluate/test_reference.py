"""What can be a reference, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from far_export.evaluate import reference as module
from far_export.evaluate.evaluation import compare_with_reference
from far_export.evaluate.features import FeatureExtractor
from far_export.evaluate.metrics import feature_statistics
from far_export.evaluate.reference import open_reference, split_part
from far_runtime.errors import FarError

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)


def test_parts_of_a_folder(folder: Path, colours: FeatureExtractor) -> None:
    parts = {part: open_reference(f"{folder}{part}", 8, colours) for part in ("", ":train", ":held_out", ":all")}
    assert [one.count for one in parts.values()] == [8, 8, 4, 12]
    assert [one.name for one in parts.values()] == [
        f"pictures:{part}" for part in ("train", "train", "held_out", "all")
    ]
    assert parts[""].digest == parts[":train"].digest != parts[":all"].digest
    expected = feature_statistics(colours(np.load(folder / "images.npy")[8:]).features)
    assert parts[":held_out"].statistics.covariance == pytest.approx(expected.covariance)
    assert split_part("C:\\pictures:held_out") == (Path("C:\\pictures"), "held_out")
    assert split_part("C:\\pictures") == (Path("C:\\pictures"), "")


def test_pictures_in_folders(tmp_path: Path, colours: FeatureExtractor) -> None:
    for i, picture in enumerate(IMAGES[:4]):
        for place in (tmp_path / "flat", tmp_path / "classes" / str(i % 2)):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / f"{i}.png")
    flat, classes = (open_reference(str(tmp_path / name), 8, colours) for name in ("flat", "classes"))
    assert (flat.name, flat.count, classes.count) == ("flat", 4, 4)
    assert flat.statistics.mean == pytest.approx(feature_statistics(colours(IMAGES[:4]).features).mean)
    assert classes.statistics.mean == pytest.approx(flat.statistics.mean)


def test_features_are_kept_block_by_block(
    folder: Path, colours: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_BATCH", 3)
    whole = open_reference(f"{folder}:all", 8, FeatureExtractor("colours", 6, "other", False, colours.network))
    seen: list[int] = []

    def ends(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(pictures))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return colours.network(pictures)

    network = FeatureExtractor("colours", 6, "none", False, ends)
    with pytest.raises(KeyboardInterrupt):
        open_reference(f"{folder}:all", 8, network)
    again = open_reference(f"{folder}:all", 8, network)
    assert seen == [3, 3, 3, 3, 3]
    assert again.digest == whole.digest
    assert again.statistics.mean.tolist() == whole.statistics.mean.tolist()


def test_published_statistics(tmp_path: Path, colours: FeatureExtractor) -> None:
    features = colours(IMAGES).features
    wanted = feature_statistics(features)
    both = {"mu": wanted.mean, "sigma": wanted.covariance}
    np.savez(tmp_path / "far.npz", **both)
    np.savez(tmp_path / "adm.npz", **both, mu_s=np.zeros(3), sigma_s=np.eye(3), arr_0=IMAGES[:55])
    np.savez(tmp_path / "sample.npz", arr_0=IMAGES)
    np.savez(tmp_path / "other.npz", mu=np.zeros(9), sigma=np.eye(9), arr_0=IMAGES)
    far, adm, sample, other = (
        open_reference(str(tmp_path / f"{name}.npz"), 8, colours) for name in ("far", "adm", "sample", "other")
    )
    assert far.features is None
    assert (far.count, adm.count, sample.count) == (None, 55, 60)
    for one in (far, adm, sample, other):
        assert one.statistics.mean == pytest.approx(wanted.mean)
        assert one.statistics.covariance == pytest.approx(wanted.covariance)
    assert "statistics are of 9 features" in other.note
    drawn = colours(RANDOM.integers(0, 200, (50, 8, 8, 3), dtype=np.uint8)).features
    bare, whole = (compare_with_reference(drawn, one, None, 1.0) for one in (far, adm))
    assert bare.precision is bare.frechet_48 is None
    assert "need the reference's pictures" in bare.missing[0]
    assert whole.missing == ()
    assert 0 <= whole.precision <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": np.zeros(3)}, "has a; expected mu and sigma"),
        ({}, "has nothing; expected mu and sigma"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "statistics of 9 features; colours has 6; give the network"),
        ({"mu": np.zeros(6), "sigma": np.zeros(6)}, r"expected \[D\] and \[D, D\]"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "not finite"),
        ({"mu": np.array(["a"] * 6), "sigma": np.eye(6)}, "not a readable .npz"),
        ({"mu": np.array([None] * 6), "sigma": np.eye(6)}, "not a readable .npz"),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, "arr_0 is uint8"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, "arr_0 is float32"),
    ],
)
def test_statistics_that_are_none(
    tmp_path: Path, colours: FeatureExtractor, content: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "file.npz", **content)
    with pytest.raises(FarError, match=message):
        open_reference(str(tmp_path / "file.npz"), 8, colours)


def test_references_that_are_none(tmp_path: Path, folder: Path, colours: FeatureExtractor) -> None:
    def message(text: object) -> str:
        with pytest.raises(FarError) as caught:
            open_reference(str(text), 8, colours)
        return str(caught.value)

    assert "no such file or folder" in message(tmp_path / "none")
    (tmp_path / "text.npz").write_text("no zip")
    assert "not a readable .npz" in message(tmp_path / "text.npz")
    assert "only a folder has parts" in message(f"{tmp_path / 'text.npz'}:train")
    (tmp_path / "empty").mkdir()
    assert "no pictures" in message(tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_text("no picture")
    assert "2 or more" in message(tmp_path / "empty")
    (tmp_path / "empty" / "b.png").write_text("no picture")
    assert "cannot be read as a picture" in message(tmp_path / "empty")
    for split in ("no JSON", "{}", json.dumps({"train": [0, 1], "held_out": [99]})):
        (folder / "split.json").write_text(split)
        assert "split.json" in message(folder)
