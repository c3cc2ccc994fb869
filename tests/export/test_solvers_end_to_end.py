"""Solvers and numbers of steps that differ by level, through every system's bundle and against its checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from far_runtime.cli.main import main

if TYPE_CHECKING:
    from conftest import Tiny

# Bundle, checkpoint, further arguments; steps and solvers by level or iteration.
CASES: dict[str, tuple[str, str, tuple[str, ...], str, str]] = {
    "far": ("bundle", "safetensors", (), "1,4,2,3", "ddim,dpmpp-2m,dpmpp-2m-sde,ddpm"),
    "far, masked": ("masked_bundle", "masked", (), "3,2", "dpmpp-2m-sde,dpmpp-2m"),
    "far_t2i": ("t2i_bundle", "t2i", ("--prompt", "a red lion"), "2,1,4,3", "dpmpp-2m,ddpm,dpmpp-2m,ddim"),
    "mar": ("mar_bundle", "mar", (), "4,3,1,2", "ddpm,dpmpp-2m,ddim,dpmpp-2m-sde"),
}


def verify(tiny: Tiny, case: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """The report of far verify; it must pass."""
    bundle, checkpoint, arguments, _, _ = CASES[case]
    given = ["verify", getattr(tiny, bundle), "--checkpoint", getattr(tiny, checkpoint), "--vae", tiny.vae]
    if case == "far_t2i":
        given += ["--text-encoder", tiny.bert]
    with pytest.raises(SystemExit) as ended:
        main(
            [str(one) for one in (*given, "--engine", "onnxruntime", "--threads", 1, "--json", "-", *arguments, *more)]
        )
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    report: dict[str, Any] = json.loads(out)
    assert report["passed"] and report["failures"] == []
    return report


@pytest.mark.parametrize("case", CASES)
def test_steps_and_solvers_by_level(case: str, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    *_, steps, solvers = CASES[case]
    report = verify(tiny, case, capsys, "--steps", steps, "--solver", solvers)
    numbers = [int(one) for one in steps.split(",")]
    assert report["settings"]["steps"] == numbers and report["settings"]["solver"] == solvers.split(",")
    outputs = [result["calls"] for result in report["stages"] if result["output"] == "next_state"]
    assert outputs == numbers == [step["inner"] for step in report["plan"]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "dpmpp-2m-sde"])
def test_one_solver_at_all_levels(case: str, solver: str, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify(tiny, case, capsys, "--steps", "4", "--solver", solver, "--start", "900")
    assert (report["settings"]["solver"], report["settings"]["start"]) == (solver, 900)


@pytest.mark.parametrize("case", CASES)
def test_presets_of_a_bundle_that_was_not_tuned(case: str, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """They keep the levels that it has graphs for."""
    report = verify(tiny, case, capsys, "--preset", "fast")
    assert report["settings"]["solver"] == "dpmpp-2m"
    count = len(report["plan"])
    assert [step["inner"] for step in report["plan"]] == ([8, 6, 5, 3] if case == "mar" else [3] * count)
