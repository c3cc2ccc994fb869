"""scripts/studies/check_precision.py: one table, nothing done twice, and exit 1 beyond a limit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

import check_precision
from far_export.verify import distribution, parity

if TYPE_CHECKING:
    from conftest import Tiny


def test_a_row_is_measured_once_and_a_broken_limit_fails(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(distribution, "MIN_COUNT", 4)
    monkeypatch.setattr(
        distribution, "extract_features", lambda network, images: images.reshape(len(images), -1).astype(float)
    )
    shutil.copytree(tiny.bundle, tmp_path / "out" / "fp32", ignore=shutil.ignore_patterns("engines"))
    command = [
        "-o", str(tmp_path / "out"), "--checkpoint", str(tiny.safetensors), "--vae", str(tiny.vae),
        "--precision", "fp32", "--engine", "onnxruntime", "--count", "4", "--pictures", "2",
        "--json", str(tmp_path / "table.json"),
    ]  # fmt: skip

    def run() -> Any:
        return CliRunner().invoke(check_precision.main, command, catch_exceptions=False)

    first = run()
    assert first.exit_code == 0, first.output
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert set(row["stages"]) == {"transformer", "denoise", "decode"}
    assert row["distribution"]["count"] == 4 and row["failures"] == []
    assert "| fp32 | onnxruntime:cpu" in first.output

    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(parity, "compare_engines", again)
    assert run().exit_code == 0

    file = tmp_path / "out" / "fp32-onnxruntime.json"
    file.write_text(json.dumps({**row, "failures": ["ratio 2.000"]}))
    broken = run()
    assert broken.exit_code == 1 and "fp32: ratio 2.000" in broken.output and "FAIL" in broken.output


def test_too_few_pictures_are_bad_input(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.bundle, tmp_path / "fp32", ignore=shutil.ignore_patterns("engines"))
    command = [
        "-o",
        str(tmp_path),
        "--checkpoint",
        str(tiny.safetensors),
        "--vae",
        str(tiny.vae),
        "--precision",
        "fp32",
    ]
    made = CliRunner().invoke(
        check_precision.main, [*command, "--engine", "onnxruntime", "--count", "8", "--pictures", "1"]
    )
    assert made.exit_code == 2 and "expected 96 or more" in made.output
