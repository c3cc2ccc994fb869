"""far tune: the cheapest schedule within a limit, a journal to go on from, presets that are written whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from far_export.tune import run
from far_export.tune.distance import frequencies, spectral_distance
from far_export.tune.journal import Journal
from far_export.tune.presets import read_presets, write_presets
from far_export.tune.search import Candidate, OutOfBudget, Search, Settings, Space, front
from far_export.verify import distribution
from far_runtime.bundle import open_bundle
from far_runtime.cli.main import cli
from far_runtime.errors import FarError
from far_runtime.sampling.presets import LIMITS, preset_of
from far_runtime.sampling.settings import resolve_settings

if TYPE_CHECKING:
    from conftest import Tiny

SPACE = Space((0, 1, 2, 3), 4, (1.0, 1.5, 2.0, 2.5), epsilon=False)
BASE: Settings = {"start": None, "guidance_floor": 1.0, "guidance": 3.0, "temperature": 1.0}
NEEDED = {0: 1, 1: 2, 3: 4}
"""Steps that the levels of the fake model need; level 2 is of no use."""


class Fake:
    """A model whose ratio is 1 where every level has the steps that it needs, and grows with what is missing."""

    def __init__(self) -> None:
        self.drawn: list[Settings] = []

    def cost(self, settings: Settings) -> float:
        scales = dict(zip(SPACE.levels, SPACE.guidance, strict=True))
        steps = settings["steps"] if isinstance(settings["steps"], list) else [settings["steps"]] * 4
        return sum(
            (10 + step) * (2 if scales[level] > settings["guidance_floor"] else 1)
            for level, step in zip(settings["levels"], steps, strict=True)
        )

    def __call__(self, settings: Settings) -> Candidate:
        self.drawn.append(settings)
        have = dict(zip(settings["levels"], settings["steps"], strict=True))
        missing = sum(max(0, need - have.get(level, -8)) for level, need in NEEDED.items())
        missing += 0.6 * (settings["guidance_floor"] >= 2.0) + (settings["solver"] == "ddim")
        return Candidate(settings, self.cost(settings), 1 + 0.2 * missing, 1.0, 0.1)

    confirm = __call__


def test_the_search_finds_the_cheapest_schedule_within_every_limit() -> None:
    fake = Fake()
    search = Search(SPACE, fake, fake.cost, BASE)
    search.run([1.05, 1.3])
    best = search.cheapest(1.05)
    assert best is not None and best.settings["solver"].startswith("dpmpp-2m")
    assert (best.settings["levels"], best.settings["steps"]) == ([0, 1, 3], [1, 2, 4])
    assert best.settings["guidance_floor"] == 1.5  # the level whose guidance is hardly any runs without
    looser = search.cheapest(1.3)
    assert looser is not None and looser.flops < best.flops and 1.05 < looser.ratio <= 1.3
    assert len(fake.drawn) == len({repr(sorted(one.items())) for one in fake.drawn}) < 100
    edge = front(search.candidates)
    assert all(a.flops < b.flops and a.ratio > b.ratio for a, b in pairwise(edge))


def test_another_start_is_tried_where_the_model_predicts_epsilon_alone() -> None:
    def starts(epsilon: bool) -> set[Any]:
        space = Space(SPACE.levels, 4, SPACE.guidance, epsilon)
        return {one["start"] for one in Search(space, Fake(), Fake().cost, BASE).finer("ddim")}

    assert starts(False) == {None}
    assert starts(True) > {None, 950}


def test_a_search_goes_on_where_it_was_ended(tiny: Tiny, tmp_path: Path) -> None:
    manifest = open_bundle(tiny.bundle).manifest
    whole, first, second = Fake(), Fake(), Fake()
    wanted = run.tune(manifest, whole, Journal(tmp_path / "whole", {}), run.Budget())
    assert wanted.complete and set(wanted.chosen) == set(LIMITS)
    ended = run.tune(manifest, first, Journal(tmp_path / "parts", {"a": 1}), run.Budget(evaluations=9))
    assert not ended.complete and 9 <= len(first.drawn) <= 9 + 3 * run.MAX_CONFIRMATIONS
    with (tmp_path / "parts").open("a") as file:
        file.write('{"facts": "cut of')  # killed while it wrote
    went_on = run.tune(manifest, second, Journal(tmp_path / "parts", {"a": 1}), run.Budget())
    assert went_on == wanted
    assert len(second.drawn) < len(whole.drawn)
    again = Fake()
    assert run.tune(manifest, again, Journal(tmp_path / "parts", {"a": 1}), run.Budget()) == wanted
    assert again.drawn == []
    other = Fake()
    run.tune(manifest, other, Journal(tmp_path / "parts", {"a": 2}), run.Budget(evaluations=3))
    assert len(other.drawn) >= 3  # of another bundle or engine: nothing of it is believed


def test_other_seeds_refuse_what_was_luck(tiny: Tiny, tmp_path: Path) -> None:
    class Lucky(Fake):
        """More steps are always a little better, and those with few of them do badly with other seeds."""

        def __call__(self, settings: Settings) -> Candidate:
            found = super().__call__(settings)
            return replace(found, image=found.image + 0.04 / sum(settings["steps"]))

        def confirm(self, settings: Settings) -> Candidate:
            found = self(settings)
            return replace(found, image=found.image + (1.0 if sum(settings["steps"]) <= 7 else 0))

    scorer = Lucky()
    found = run.tune(open_bundle(tiny.bundle).manifest, scorer, Journal(tmp_path / "j", {}), run.Budget())
    assert min(sum(one.settings["steps"]) for one in found.candidates.values() if one.ratio <= 1.05) <= 7
    assert sum(found.chosen["quality"].candidate.settings["steps"]) > 7


def test_candidates_that_the_bundle_cannot_draw_are_passed_over(tiny: Tiny, tmp_path: Path) -> None:
    """A masked model's levels have rules of their own, and a bundle with graphs per level has these levels only."""
    manifest = open_bundle(tiny.masked_bundle).manifest
    space, base = Space((0, 2), 2, (1.0, 2.0), epsilon=False), {"guidance_floor": 1.0}
    drawn: list[Settings] = []

    def score(one: Settings) -> Candidate:
        drawn.append(one)
        resolve_settings(manifest, one)
        return Candidate(one, float(sum(one["steps"])), 1.0, 1.0, 0.1)

    def possible(one: Settings) -> bool:
        return len(one["levels"]) == 2

    Search(space, score, lambda one: float(sum(one["steps"])), base, possible).run([1.1])
    assert drawn and all(one["levels"] == [0, 2] for one in drawn)
    assert min(sum(one["steps"]) for one in drawn) == 2


def test_a_system_without_diffusion_is_refused(tiny: Tiny) -> None:
    manifest = replace(open_bundle(tiny.bundle).manifest, system="var")
    with pytest.raises(FarError, match="a var bundle has no diffusion steps to tune"):
        run.space_of(manifest)


def test_a_bundle_that_cannot_be_written_is_told_before_the_search(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny.bundle  # made before writing is refused

    def refuse(**options: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("far_runtime.storage.atomic.tempfile.TemporaryFile", refuse)
    result = tune(bundle)
    assert "takes no presets; tune a copy that can be" in str(result.exception) + result.output


def test_nothing_is_drawn_beyond_the_budget() -> None:
    def refuse(settings: Settings) -> Candidate:
        raise OutOfBudget

    with pytest.raises(OutOfBudget):
        Search(SPACE, refuse, Fake().cost, BASE).run([1.1])


def test_frequencies_are_an_orthonormal_transform_and_their_distance_sees_a_lost_one() -> None:
    latents = np.random.default_rng(0).standard_normal((300, 16, 2)).astype(np.float32)
    found = frequencies(latents, 4)
    assert np.allclose(np.linalg.norm(found, axis=1), np.linalg.norm(latents.reshape(300, -1), axis=1))
    flat = np.repeat(latents.mean(axis=1, keepdims=True), 16, axis=1)
    assert np.abs(frequencies(flat, 4)[:, 2:]).max() < 1e-5  # the mean alone is left, of both channels
    assert spectral_distance(found, found) == 0
    assert spectral_distance(frequencies(flat, 4), found) == pytest.approx(30, rel=0.2)  # 15 frequencies, 2 channels


def tune(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["tune", *(str(one) for one in arguments)])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few pictures, their pixels for features, and limits that a random model keeps."""
    for name in LIMITS:
        monkeypatch.setitem(LIMITS, name, 1e9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(distribution, "MIN_COUNT", 4)
    monkeypatch.setattr("far_export.tune.distance.extract_features", lambda network, images: pixels(images))
    monkeypatch.setattr("far_export.tune.distance.WIDTH", 48)


def pixels(images: Any) -> Any:
    return images[:, ::4, ::4].reshape(len(images), -1).astype(float)


def test_from_a_bundle_to_its_presets(tiny: Tiny, tmp_path: Path, quick: None) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny.bundle, bundle, ignore=shutil.ignore_patterns("engines"))
    before = open_bundle(bundle).manifest
    options = (bundle, "--engine", "onnxruntime", "--count", 8, "--evaluations", 14)
    result = tune(*options, "--dry-run", "--json", tmp_path / "all.json")
    assert result.exit_code == 0, result.output
    assert open_bundle(bundle).manifest == before
    content = json.loads((tmp_path / "all.json").read_text())
    assert len(content["candidates"]) == 14 and not content["complete"]
    result = tune(*options[:-1], 6, "--save", tmp_path / "p.json", "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert "going on with" in result.output and (tmp_path / "p.png").stat().st_size > 1000
    after = open_bundle(bundle).manifest
    assert after.id == before.id and after.graphs == before.graphs
    assert after.presets == read_presets(tmp_path / "p.json") and after.presets
    for name in after.presets:
        assert f"preset {name}: tuned, distance " in preset_of(after, name).line
        made = CliRunner().invoke(
            cli, ["generate", str(bundle), "--label", "1", "--preset", name, "-o", str(tmp_path / "out.png")]
        )
        assert made.exit_code == 0 and f"preset {name}: tuned" in made.output
    with pytest.raises(FarError, match=r"levels: preset .* has steps .*, for its own levels; give steps beside it"):
        uneven = {"settings": {"levels": [0, 1, 3], "steps": [1, 2, 1]}, "measured": {"ratio": 1.0}}
        resolve_settings(replace(after, presets={"fast": uneven}), {"preset": "fast", "levels": [0, 1]})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--count", 5], "5 pictures for the distribution: expected 96 or more; use --count 256"),
        (["--plot", "x.gif"], "a plot is written as PNG or SVG"),
        (["--save", "a.json", "--json", "a.json"], "--save and --json would both write it"),
        (["--engine", "abacus"], "engine 'abacus': unknown"),
    ],
)
def test_bad_input_gets_one_line(tiny: Tiny, arguments: list[object], reason: str, monkeypatch: Any) -> None:
    result = tune(tiny.bundle, *arguments)
    assert isinstance(result.exception, FarError | SystemExit) and reason in str(result.exception) + result.output


def test_a_manifest_that_cannot_be_written_stays(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny.bundle, bundle, ignore=shutil.ignore_patterns("engines"))
    before = (bundle / "manifest.json").read_bytes()

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("far_runtime.storage.atomic.os.replace", full)
    with pytest.raises(FarError, match=r"No space left on device.*--save FILE"):
        write_presets(open_bundle(bundle), {"fast": {"settings": {}, "measured": {"ratio": 1.0}}})
    monkeypatch.undo()
    assert (bundle / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in bundle.glob("*.part")) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"fast": 3}', '{"swift": {"settings": {}, "measured": {"ratio": 1}}}'])
def test_a_file_that_holds_no_presets_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(FarError, match="no file of presets"):
        read_presets(tmp_path / "p.json")
