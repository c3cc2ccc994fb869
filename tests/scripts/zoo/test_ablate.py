"""The table of ablations: differences seed by seed, what is seen and what is not, runs that are there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ablate
from ablate import BASE, DRAWN, TRAINED, Ablation


def plan(runs: Path) -> Ablation:
    return Ablation(Path("data"), Path("latents"), Path("vae"), runs, 10, 96)


def write(runs: Path, name: str, seed: int, figures: dict[str, float], steps: int = 10) -> None:
    (runs / f"{name}-{seed}").mkdir()
    content = {"steps": steps, "count": 96, "figures": figures}
    (runs / f"{name}-{seed}" / ablate.FIGURES).write_text(json.dumps(content))


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    for seed, level in enumerate((100.0, 50.0, 150.0)):
        write(tmp_path, BASE, seed, {"": level, "steps-50": level - 20})
        write(tmp_path, "plain", seed, {"": level + 10 + seed})
        write(tmp_path, "low", seed, {"": level + (-1) ** seed * 3})
    write(tmp_path, "noise", 0, {"": 90.0})
    write(tmp_path, "fourier", 0, {"": 1.0}, steps=11)  # of another plan
    rows = ablate.found_figures(plan(tmp_path), range(3))
    assert ablate.verdict(rows, "plain") == ("+11.0 ± 0.6", "worse")
    assert ablate.verdict(rows, "steps-50") == ("-20.0 ± 0.0", "better")
    assert ablate.verdict(rows, "low")[1] == "no difference seen"
    assert ablate.verdict(rows, "noise") == ("", "")  # one seed says nothing
    assert "fourier" not in rows
    text = ablate.document(plan(tmp_path), rows)
    assert (
        f"| {TRAINED['plain'].title} | 111.0 ± {np.std([110, 61, 162], ddof=1):.1f} | 3 | +11.0 ± 0.6 | worse |" in text
    )
    assert f"| {DRAWN['steps-50'][0]} | 80.0 ± 50.0 | 3 |" in text
    assert TRAINED["fourier"].title not in text


def test_every_run_differs_in_one_thing() -> None:
    options = [variant.options for variant in TRAINED.values()]
    assert len(set(options)) == len(options)
    assert all(len(text.split()) <= 2 for text in options)
    assert DRAWN["levels-4"][1]["levels"] == [0, 2, 5, 7]


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(ablate.FarError, match=r"base-0: the run failed: .*no such file"):
        ablate.train(Ablation(tmp_path, tmp_path / "none", tmp_path / "vae", tmp_path, 1, 96), BASE, 0)
