"""far evaluate: the figures against other formulas, references, prompts, a run that goes on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from far_export.evaluate import draw as drawing
from far_export.evaluate import networks
from far_export.evaluate.metrics import (
    Statistics,
    frechet,
    frechet_of,
    inception_score,
    precision_recall,
    statistics_of,
)
from far_export.evaluate.networks import Extractor
from far_export.evaluate.prompts import read_prompts
from far_export.evaluate.reference import open_reference, split_part
from far_runtime.bundle import open_bundle
from far_runtime.cli import cli
from far_runtime.errors import FarError

if TYPE_CHECKING:
    from conftest import Tiny

RANDOM = np.random.default_rng(0)


def colours(width: int = 6, inception: bool = False) -> Extractor:
    """A network that takes no time: mean and deviation of the colours."""

    def compute(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = pictures.float() / 255
        features = torch.cat([values.mean(dim=(2, 3)), values.std(dim=(2, 3))], dim=1)
        return features, features.softmax(1)

    return Extractor("colours", width, "none", inception, compute)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(networks, "lite", colours)
    monkeypatch.setattr(drawing, "PART", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of three classes, four of them held out."""
    path = tmp_path / "pictures"
    path.mkdir()
    np.save(path / "images.npy", RANDOM.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    np.save(path / "labels.npy", np.arange(12) % 3)
    (path / "split.json").write_text(json.dumps({"train": list(range(8)), "held_out": [8, 9, 10, 11]}))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


def error_of(*arguments: object) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, FarError), result.output
    return str(result.exception)


def test_distance_of_statistics_is_that_of_the_features() -> None:
    a, b = RANDOM.normal(size=(40, 5)), RANDOM.normal(size=(50, 5)) @ RANDOM.normal(size=(5, 5))
    assert frechet_of(statistics_of(a), statistics_of(b)) == pytest.approx(frechet(a, b))
    zero = Statistics(np.zeros(2), np.zeros((2, 2)))
    assert frechet_of(zero, Statistics(np.array([3.0, 4.0]), np.eye(2))) == pytest.approx(27)


def test_inception_score_of_what_is_sure_and_even_is_the_number_of_classes() -> None:
    sure = np.eye(4)[np.arange(400) % 4]
    assert inception_score(sure) == (pytest.approx(4), pytest.approx(0, abs=1e-9))
    assert inception_score(np.full((400, 4), 0.25))[0] == pytest.approx(1)
    p = RANDOM.dirichlet(np.ones(5), 30)
    halves = [np.exp(np.mean([np.sum(q * np.log(q / part.mean(0))) for q in part])) for part in (p[:15], p[15:])]
    assert inception_score(p, 2) == (pytest.approx(np.mean(halves)), pytest.approx(np.std(halves)))


def test_precision_and_recall_are_those_of_every_pair() -> None:
    a, b = RANDOM.normal(size=(60, 3)), 0.7 + RANDOM.normal(size=(50, 3))

    def covered(points: NDArray[np.float64], centres: NDArray[np.float64]) -> float:
        radius = [sorted(np.linalg.norm(centres - centre, axis=1))[2] for centre in centres]
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius, strict=True)) for p in points]
        return float(np.mean(inside))

    precision, recall = precision_recall(a, b, k=2)
    assert (precision, recall) == (pytest.approx(covered(a, b)), pytest.approx(covered(b, a)))
    assert 0 < precision < 1
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 1000) == (0, 0)


def test_figures_of_a_bundle(quick: None, tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    references = ("--reference", folder, "--reference", f"{folder}:held_out")
    result = run(tiny.bundle, *references, "--count", 10, "--floor", tiny.vae, "--images", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "no FID" in result.output
    assert "no inception score" in result.output
    found = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert found["count"] == 10
    assert found["network"] == "colours"
    assert [one["reference_pictures"] for one in found["against"]] == [8, 4]
    assert [one["reference"] for one in found["against"]] == ["pictures:train", "pictures:held_out"]
    for one in found["against"]:
        assert one["frechet"] > 0
        assert one["floor"] > 0
        assert one["frechet_48"] is None
        assert "49 pictures" in one["missing"][0]
    files = sorted((tmp_path / "out" / "pictures").iterdir())
    assert [file.name for file in files] == [f"{seed:07d}.png" for seed in range(10)]
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    own = statistics_of(colours()(images).features)
    wanted = statistics_of(colours()(np.load(folder / "images.npy")[:8]).features)
    assert found["against"][0]["frechet"] == pytest.approx(frechet_of(own, wanted), rel=1e-6)


def test_classes_are_drawn_equally_often_and_by_seed(
    quick: None, tiny: Tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from far_runtime.pipeline import Pipeline

    drawn: list[tuple[int, int]] = []
    generate = Pipeline.generate

    def spy(self: Pipeline, subjects: Sequence[Any], seeds: Sequence[int], **rest: Any) -> Any:
        drawn.extend((subject.label, seed) for subject, seed in zip(subjects, seeds, strict=True))
        return generate(self, subjects, seeds, **rest)

    monkeypatch.setattr(Pipeline, "generate", spy)
    classes = open_bundle(tiny.bundle).manifest.model["classes"]
    assert (
        run(tiny.bundle, "--reference", folder, "--count", 2 * classes, "--seed", 5, "-o", tmp_path / "o").exit_code
        == 0
    )
    assert [seed for _, seed in drawn] == list(range(5, 5 + 2 * classes))
    assert set(Counter(label for label, _ in drawn).values()) == {2}


def test_a_run_that_was_killed_goes_on_and_finds_the_same(
    quick: None, tiny: Tiny, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from far_runtime.pipeline import Pipeline

    def arguments(out: str, batch: int) -> tuple[object, ...]:
        settings = ("--count", 10, "--batch-size", batch, "-o", tmp_path / out)
        return (tiny.bundle, "--reference", folder, *settings, "--images")

    assert run(*arguments("straight", 4)).exit_code == 0
    calls, generate = 0, Pipeline.generate

    def dying(self: Pipeline, *given: Any, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return generate(self, *given, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate", dying)
        assert run(*arguments("killed", 2)).exit_code != 0
    assert len(list((tmp_path / "killed" / "features").iterdir())) == 2
    assert not (tmp_path / "killed" / "evaluate.json").exists()
    result = run(*arguments("killed", 2))
    assert "going on: 8 of 10" in result.output
    straight, killed = (json.loads((tmp_path / out / "evaluate.json").read_text()) for out in ("straight", "killed"))
    assert killed["against"][0]["frechet"] == pytest.approx(straight["against"][0]["frechet"], rel=1e-4)
    for file in (tmp_path / "straight" / "pictures").iterdir():
        ours, theirs = (
            np.asarray(Image.open(tmp_path / out / "pictures" / file.name)) for out in ("straight", "killed")
        )
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    before = (tmp_path / "killed" / "evaluate.json").read_text()
    assert run(*arguments("killed", 2)).exit_code == 0
    assert (tmp_path / "killed" / "evaluate.json").read_text() == before
    damaged = tmp_path / "killed" / "features" / "000004-000007.npz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert run(*arguments("killed", 2)).exit_code == 0
    assert (tmp_path / "killed" / "evaluate.json").read_text() == before
    assert "seed 0 -> 3" in error_of(*arguments("killed", 2), "--seed", 3)


def test_published_statistics_are_read(
    quick: None, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "inception", lambda path: colours(inception=True))
    images = RANDOM.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    statistics = statistics_of(colours()(images).features)
    both = {"mu": statistics.mean, "sigma": statistics.covariance}
    np.savez(tmp_path / "far.npz", **both)
    np.savez(tmp_path / "adm.npz", **both, mu_s=np.zeros(3), sigma_s=np.eye(3), arr_0=images)
    files = ("--reference", tmp_path / "far.npz", "--reference", tmp_path / "adm.npz")
    weights = tmp_path / "weights.pt"
    result = run(tiny.bundle, *files, "--inception", weights, "--count", 6, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    bare, adm = json.loads(result.stdout)["against"]
    assert bare["frechet"] == pytest.approx(adm["frechet"])
    assert bare["precision"] is None
    assert "reference's pictures" in bare["missing"][0]
    assert 0 <= adm["precision"] <= 1
    assert "FID" in run(tiny.bundle, *files, "--inception", weights, "--count", 6, "-o", tmp_path / "out").output


def test_pictures_in_folders_are_references(quick: None, tmp_path: Path) -> None:
    images = RANDOM.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    for i, picture in enumerate(images):
        for place in (tmp_path / "flat", tmp_path / "classes" / str(i % 2)):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / f"{i}.png")
    flat, classes = (
        open_reference(str(tmp_path / name), 8, colours(), lambda line: None) for name in ("flat", "classes")
    )
    assert flat.count == classes.count == 4
    assert flat.statistics.mean == pytest.approx(statistics_of(colours()(images).features).mean)
    assert classes.statistics.mean == pytest.approx(flat.statistics.mean)
    assert split_part("C:\\pictures:held_out") == (Path("C:\\pictures"), "held_out")
    assert split_part("C:\\pictures") == (Path("C:\\pictures"), "")


def test_lite_knows_what_it_sees() -> None:
    network = networks.lite()
    found = network(RANDOM.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    assert found.features.shape == (3, network.width)
    assert found.probabilities.shape == (3, 1000)
    assert found.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-4)


class Scripted(torch.nn.Module):
    """Called as inception-2015-12-05.pt is."""

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        values = x.float().mean(dim=(2, 3))
        return values if return_features else (values + (0 if no_output_bias else 1)).softmax(1)


class Plain(torch.nn.Module):
    """A TorchScript that is called in another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_inception_as_torchscript(tmp_path: Path) -> None:
    torch.jit.script(Scripted()).save(str(tmp_path / "inception.pt"))
    network = networks.inception(tmp_path / "inception.pt")
    images = RANDOM.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    found = network(images)
    assert network.inception
    assert network.width == 3
    assert found.features == pytest.approx(images.mean(axis=(1, 2)), rel=1e-5)
    torch.jit.script(Plain()).save(str(tmp_path / "plain.pt"))
    with pytest.raises(FarError, match="is not called as"):
        networks.inception(tmp_path / "plain.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(FarError, match="torch-fidelity"):
        networks.inception(tmp_path / "weights.pth")
    with pytest.raises(FarError, match="no such file"):
        networks.inception(tmp_path / "none.pt")


def test_prompt_files(tmp_path: Path) -> None:
    geneval = tmp_path / "evaluation_metadata.jsonl"
    lines = [json.dumps({"tag": "single_object", "include": [], "prompt": f"a photo of {what}"}) for what in "ab"]
    geneval.write_text("\n".join(lines) + "\n")
    found = read_prompts(geneval, None, None)
    assert found.prompts == ("a photo of a",) * 4 + ("a photo of b",) * 4
    assert found.names[5] == "00001/samples/00001.png"
    found.write_notes(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "00001" / "metadata.jsonl").read_text())["prompt"] == "a photo of b"
    coco = tmp_path / "captions_val2014.json"
    annotations = [{"image_id": i // 2, "id": 100 - i, "caption": f"caption\n{i}"} for i in range(10)]
    coco.write_text(json.dumps({"images": [], "annotations": annotations}))
    found = read_prompts(coco, 3, None)
    assert len(found.names) == 3
    by_name = dict(zip(found.names, found.prompts, strict=True))
    assert all(by_name[name] == f"caption {2 * int(name[:12]) + 1}" for name in found.names)
    assert read_prompts(coco, None, None).names[:3] == found.names
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\n two \n")
    assert read_prompts(text, None, 2).names == ("00000-0.png", "00000-1.png", "00001-0.png", "00001-1.png")
    for name, content in (("bad.jsonl", "{}\n"), ("bad.json", "[]"), ("empty.txt", "\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(FarError, match="--prompts"):
            read_prompts(tmp_path / name, None, None)


def test_prompts_become_pictures_where_the_scorer_looks(quick: None, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text('{"prompt": "a red apple"}\n{"prompt": "a smiling face"}\n')
    out = tmp_path / "out"
    assert run(tiny.t2i_bundle, "--prompts", file, "--samples", 3, "-o", out).exit_code == 0
    assert len(list(out.glob("0000?/samples/0000?.png"))) == 6
    assert (out / "00000" / "metadata.jsonl").read_text() == '{"prompt": "a red apple"}\n'
    first = (out / "00001" / "samples" / "00002.png").read_bytes()
    (out / "00001" / "samples" / "00002.png").unlink()
    assert "going on: 4 of 6" in run(tiny.t2i_bundle, "--prompts", file, "--samples", 3, "-o", out).output
    assert (out / "00001" / "samples" / "00002.png").read_bytes() == first
    file.write_text('{"prompt": "a green apple"}\n{"prompt": "a smiling face"}\n')
    assert "holds pictures of another run" in error_of(tiny.t2i_bundle, "--prompts", file, "--samples", 3, "-o", out)


def test_bad_input_is_named(quick: None, tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    assert "nothing to compare with" in error_of(tiny.bundle, *out)
    assert "no such file" in error_of(tiny.bundle, "--reference", tmp_path / "none.npz", *out)
    assert "draws from class labels" in error_of(tiny.bundle, "--prompts", folder / "labels.npy", *out)
    assert "--prompts FILE" in error_of(tiny.t2i_bundle, "--reference", folder, *out)
    assert "--samples" in error_of(tiny.bundle, "--reference", folder, "--samples", 2, *out)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    assert "expected mu and sigma" in error_of(tiny.bundle, "--reference", tmp_path / "other.npz", *out)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    assert "--inception" in error_of(tiny.bundle, "--reference", tmp_path / "wide.npz", *out)
    np.savez(tmp_path / "flat.npz", mu=np.zeros(6), sigma=np.zeros(6))
    assert "expected [D] and [D, D]" in error_of(tiny.bundle, "--reference", tmp_path / "flat.npz", *out)
    (tmp_path / "text.npz").write_text("no zip")
    assert "not a readable .npz" in error_of(tiny.bundle, "--reference", tmp_path / "text.npz", *out)
    assert "only a folder has parts" in error_of(tiny.bundle, "--reference", f"{tmp_path / 'flat.npz'}:train", *out)
    shutil.rmtree(folder)
    assert "no such file or folder" in error_of(tiny.bundle, "--reference", folder, *out)
