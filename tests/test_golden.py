"""The official code's outputs are reproduced, on torch and on ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import check_golden

CASES = Path(__file__).parent / "golden"
NAMES = sorted(path.parent.name for path in CASES.glob("*/case.json"))


def test_every_system_has_a_case() -> None:
    systems = {json.loads((CASES / case / "case.json").read_text())["system"] for case in NAMES}
    assert systems == set(check_golden.CHECKS)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("case", NAMES)
def test_case_passes(case: str, engine: str) -> None:
    result = check_golden.check_case(CASES / case, engine)
    assert result["passed"], result
    assert result["errors"]


def test_a_wrong_expectation_fails(tmp_path: Path) -> None:
    folder = shutil.copytree(CASES / "far", tmp_path / "far")
    with np.load(folder / "expected.npz") as arrays:
        expected = dict(arrays)
    expected["latents"] = expected["latents"] * 1.01
    np.savez(folder / "expected.npz", **expected)
    result = check_golden.check_case(folder, "torch")
    assert not result["passed"]
    assert result["errors"]["latents"] > check_golden.LOOP_TOLERANCE
    assert result["errors"]["sampled"] < check_golden.LOOP_TOLERANCE


def test_other_settings_run(tmp_path: Path) -> None:
    """Another seed, batch, level list and guidance 1 run through; they cannot match, and that is what is reported."""
    folder = shutil.copytree(CASES / "far", tmp_path / "far")
    case = json.loads((folder / "case.json").read_text())
    case |= {"seed": 3, "labels": [5], "levels": [0, 4, 9], "cfg": 1.0, "diffusion_steps": 2}
    (folder / "case.json").write_text(json.dumps(case))
    with np.load(folder / "expected.npz") as arrays:
        expected = {
            "z_every_16th": arrays["z_every_16th"][:3, :2],
            "sampled": arrays["sampled"][:3, :256],
            "latents": arrays["latents"][:1],
        }
    np.savez(folder / "expected.npz", **expected)
    result = check_golden.check_case(folder, "torch")
    assert "problem" not in result
    assert not result["passed"]
    assert all(np.isfinite(error) for error in result["errors"].values())


@pytest.mark.parametrize(
    "changed",
    [{"iterations": 3}, {"iterations": 256, "diffusion_steps": 1}, {"cfg_schedule": "constant"}, {"cfg": 1.0},
     {"seed": 5}, {"diffusion_steps": "5:2"}, {"labels": [3, 999]}],
)  # fmt: skip
def test_other_settings_of_mar_run_and_differ(tmp_path: Path, changed: dict[str, object]) -> None:
    folder = shutil.copytree(CASES / "mar", tmp_path / "mar")
    case = json.loads((folder / "case.json").read_text())
    (folder / "case.json").write_text(json.dumps(case | changed))
    with np.load(folder / "expected.npz") as arrays:
        expected = dict(arrays)
    z, iterations = expected["z_every_16th"], changed.get("iterations", case["iterations"])
    expected["z_every_16th"] = np.resize(z, (iterations, *z.shape[1:]))
    np.savez(folder / "expected.npz", **expected)
    result = check_golden.check_case(folder, "torch")
    assert "problem" not in result, result
    assert not result["passed"]
    assert all(np.isfinite(error) for error in result["errors"].values())
    assert result["errors"]["latents"] > check_golden.LOOP_TOLERANCE


def test_an_unknown_system_is_a_failed_case(tmp_path: Path) -> None:
    (tmp_path / "case.json").write_text('{"system": "unknown"}')
    np.savez(tmp_path / "expected.npz", x=np.zeros(1))
    result = check_golden.check_case(tmp_path, "torch")
    assert not result["passed"]
    assert "unknown" in result["problem"]
