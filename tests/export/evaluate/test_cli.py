"""far evaluate from end to end: figures of a bundle, and a run that goes on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from far_export.evaluate import inception as inception_module
from far_export.evaluate.features import FeatureExtractor
from far_export.evaluate.metrics import feature_statistics, frechet_distance, inception_score, precision_recall
from far_models.checkpoint.load import load_checkpoint
from far_models.reconstruction import reconstruct_pixels
from far_runtime.bundle import open_bundle
from far_runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from conftest import Tiny

Run = Callable[..., Result]


def figures(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluate.json").read_text())


def test_figures_of_a_bundle(run: Run, tiny: Tiny, folder: Path, tmp_path: Path, colours: FeatureExtractor) -> None:
    out = tmp_path / "out"
    references = ("--reference", folder, "--reference", f"{folder}:held_out")
    result = run(
        tiny.bundle, *references, "--count", 100, "--batch-size", 50, "--floor", tiny.vae, "--images", "-o", out
    )
    assert result.exit_code == 0, result.output
    assert "colours: no FID" in result.output
    assert "no inception score" in result.output
    made = figures(out)
    assert (made["count"], made["network"], made["inception"]) == (100, "colours", False)
    assert made["run"]["seed"] == 0
    assert [one["reference"] for one in made["against"]] == ["pictures:train", "pictures:held_out"]
    files = sorted((out / "pictures").iterdir())
    assert [file.name for file in files] == [f"{seed:07d}.png" for seed in range(100)]
    drawn = colours(np.stack([np.asarray(Image.open(file)) for file in files]))
    assert made["score"] == pytest.approx(inception_score(drawn.probabilities)[0])
    vae = load_checkpoint(tiny.vae).model
    images = np.load(folder / "images.npy")
    for one, pictures in zip(made["against"], (images[:8], images[8:]), strict=True):
        wanted = colours(pictures).features
        distance = frechet_distance(feature_statistics(drawn.features), feature_statistics(wanted))
        floor = frechet_distance(
            feature_statistics(colours(reconstruct_pixels(vae, pictures)).features), feature_statistics(wanted)
        )  # fmt: skip
        assert one["pictures"] == len(pictures)
        assert one["frechet"] == pytest.approx(distance, rel=1e-6)
        assert one["floor"] == pytest.approx(floor, rel=1e-6)
        assert one["times_floor"] == pytest.approx(distance / floor, rel=1e-6)
        assert (one["precision"], one["recall"]) == precision_recall(drawn.features, wanted)
        assert one["frechet_48"] is None
        assert "49 pictures" in one["missing"][0]


def test_references_of_one_name_keep_their_floors(run: Run, tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / folder.name
    other.mkdir(parents=True)
    np.save(other / "images.npy", np.load(folder / "images.npy")[:6] // 2)
    np.save(other / "labels.npy", np.arange(6))
    (folder / "split.json").unlink()
    references = ("--reference", folder, "--reference", other)
    result = run(tiny.bundle, *references, "--count", 4, "--floor", tiny.vae, "--json", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    one, two = json.loads(result.stdout)["against"]
    assert one["reference"] == two["reference"] == "pictures"
    assert one["digest"] != two["digest"]
    assert one["floor"] != two["floor"]


def test_classes_are_drawn_equally_often_and_by_seed(
    run: Run, tiny: Tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int]] = []
    generate = Pipeline.generate

    def spy(self: Pipeline, subjects: Sequence[Any], seeds: Sequence[int], **rest: Any) -> Any:
        drawn.extend((subject.label, seed) for subject, seed in zip(subjects, seeds, strict=True))
        return generate(self, subjects, seeds, **rest)

    monkeypatch.setattr(Pipeline, "generate", spy)
    classes = open_bundle(tiny.bundle).manifest.model.classes
    arguments = (tiny.bundle, "--reference", folder, "--seed", 5, "-o", tmp_path / "out")
    result = run(*arguments, "--count", 2 * classes)
    assert result.exit_code == 0
    assert "one more than others" not in result.output
    assert [seed for _, seed in drawn] == list(range(5, 5 + 2 * classes))
    assert set(Counter(label for label, _ in drawn).values()) == {2}
    drawn.clear()
    assert "one more than others" in run(*arguments, "--count", 2 * classes + 3).output
    assert drawn == [(i % classes, 5 + i) for i in range(16, 2 * classes + 3)]  # the batch that was not full


def test_a_run_that_was_killed_goes_on_and_finds_the_same(
    run: Run, tiny: Tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(out: str) -> tuple[object, ...]:
        return (tiny.bundle, "--reference", folder, "--count", 10, "--batch-size", 4, "--images", "-o", tmp_path / out)

    assert run(*arguments("straight")).exit_code == 0
    expected = figures(tmp_path / "straight")
    out, calls, generate = tmp_path / "killed", 0, Pipeline.generate

    def counting(self: Pipeline, *given: Any, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return generate(self, *given, **rest)

    monkeypatch.setattr(Pipeline, "generate", counting)
    assert run(*arguments("killed")).exit_code != 0
    kept = sorted((out / "features" / "none").iterdir())
    assert [file.name for file in kept] == ["000000-000003.npz", "000004-000007.npz"]
    assert not (out / "evaluate.json").exists()
    assert "going on: 8 are there" in run(*arguments("killed")).output
    assert calls == 4
    assert figures(out) == expected
    for file in (tmp_path / "straight" / "pictures").iterdir():
        assert (out / "pictures" / file.name).read_bytes() == file.read_bytes()
    kept[1].write_bytes(kept[1].read_bytes()[:100])  # a file that was cut short is computed again, from the pictures
    assert run(*arguments("killed")).exit_code == 0
    assert calls == 4
    assert figures(out) == expected
    (out / "pictures" / "0000009.png").write_text("damaged")
    (out / "features" / "none" / "000008-000009.npz").unlink()
    assert run(*arguments("killed")).exit_code == 0
    assert calls == 5
    assert figures(out) == expected


def test_a_run_goes_on_with_another_batch_size_and_count_but_nothing_else(
    run: Run, error_of: Callable[..., str], tiny: Tiny, folder: Path, tmp_path: Path
) -> None:
    arguments = (tiny.bundle, "--reference", folder, "-o", tmp_path / "out")
    assert run(*arguments, "--count", 10, "--batch-size", 4).exit_code == 0
    small = figures(tmp_path / "out")
    assert "going on: 9 are there" in run(*arguments, "--count", 12, "--batch-size", 3).output
    assert figures(tmp_path / "out")["count"] == 12
    assert run(*arguments, "--count", 10, "--batch-size", 8).exit_code == 0
    assert figures(tmp_path / "out")["against"][0]["frechet"] == pytest.approx(small["against"][0]["frechet"], rel=1e-4)
    assert "seed 0 -> 3" in error_of(*arguments, "--count", 10, "--seed", 3)
    assert "'temperature': 0.5" in error_of(*arguments, "--count", 10, "--temperature", 0.5)
    (tmp_path / "out" / "run.json").write_text("{")
    assert "cannot be read" in error_of(*arguments, "--count", 10)


def test_figures_of_inception_are_called_fid(
    run: Run, tiny: Tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colours: FeatureExtractor
) -> None:
    network = FeatureExtractor("inception", 6, "weights", True, colours.network)
    monkeypatch.setattr(inception_module, "inception", lambda path, say: network)
    result = run(
        tiny.bundle, "--reference", folder, "--inception", "weights.pt", "--count", 6, "-o", tmp_path / "out"
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "FID" in result.output
    assert "no FID" not in result.output
    assert "inception score: needs 100 pictures" in result.output
    assert figures(tmp_path / "out")["inception"]


def test_bad_input_is_named(error_of: Callable[..., str], tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    reference = ("--reference", folder)
    assert "nothing to compare with" in error_of(tiny.bundle, *out)
    assert "no such file" in error_of(tiny.bundle, "--reference", tmp_path / "none.npz", *out)
    assert "--floor is for comparisons" in error_of(tiny.bundle, "--floor", tiny.vae, *out)
    assert "draws from class labels" in error_of(tiny.bundle, "--prompts", folder / "labels.npy", *out)
    assert "--prompts FILE" in error_of(tiny.t2i_bundle, *reference, *out)
    assert "cannot be read as text" in error_of(tiny.t2i_bundle, "--prompts", tmp_path / "none.txt", *out)
    assert "--samples" in error_of(tiny.bundle, *reference, "--samples", 2, *out)
    assert "expected 2 or more" in error_of(tiny.bundle, *reference, "--count", 1, *out)
    assert "no such file" in error_of(tiny.bundle, *reference, "--inception", tmp_path / "none.pt", *out)
    assert "expected klvae" in error_of(tiny.bundle, *reference, "--floor", tiny.far, *out)
    assert "is a file" in error_of(tiny.bundle, *reference, "-o", folder / "labels.npy")
    assert not (tmp_path / "out" / "run.json").exists()


def test_figures_of_two_pictures_say_what_is_missing(run: Run, tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    result = run(tiny.bundle, "--reference", folder, "--count", 2, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "precision and recall need 4 pictures" in result.output
    made = figures(tmp_path / "out")
    assert made["score"] is made["against"][0]["precision"] is None
    assert made["against"][0]["frechet"] > 0


def test_a_disk_that_is_full_ends_the_run_and_it_goes_on(
    run: Run, error_of: Callable[..., str], tiny: Tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (tiny.bundle, "--reference", folder, "--count", 8, "--batch-size", 4, "-o", tmp_path / "out")
    save, calls = np.savez, 0

    def full(file: Any, **arrays: Any) -> None:
        nonlocal calls
        if "probabilities" in arrays:
            calls += 1
            if calls == 2:
                raise OSError(28, "No space left on device")
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    assert "No space left on device" in error_of(*arguments)
    assert [file.name for file in (tmp_path / "out" / "features" / "none").iterdir()] == ["000000-000003.npz"]
    assert "going on: 4 are there" in run(*arguments).output
