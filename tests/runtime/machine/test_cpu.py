"""What the processor says of itself, and what INT8 is computed in because of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from far_runtime.bundle import open_bundle
from far_runtime.engines import openvino as engine
from far_runtime.machine import cpu as processor

CPUINFO = """processor\t: 0
model name\t: Some Processor
flags\t\t: fpu sse2 avx2

processor\t: 1
flags\t\t: other
"""


@pytest.fixture
def fresh() -> Any:
    processor.processor.cache_clear()
    yield
    processor.processor.cache_clear()


def test_the_first_processor_counts(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPUINFO", file)
    file.write_text(CPUINFO)
    assert processor.processor()["model name"] == "Some Processor"
    assert list(processor.abilities()) == ["fpu", "sse2", "avx2"]


def test_without_the_file_nothing_is_known(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert list(processor.abilities()) == []


@pytest.mark.parametrize(
    ("can", "wanted"),
    [
        (["avx2", "fma"], True),
        (["avx2", "avx512f", "avx512bw"], True),
        (["avx2", "avx512f", "avx512_vnni"], False),
        (["avx2", "avx_vnni"], False),
        (["asimd", "i8mm"], False),
        ([], False),
    ],
)
def test_sums_overflow_on_x86_without_vnni(can: list[str], wanted: bool) -> None:
    assert processor.saturates(can) is wanted


@pytest.mark.parametrize("can", [["avx2"], ["avx2", "avx512_vnni"]])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_openvino_multiplies_int8_in_fp32_where_sums_would_overflow(
    precision: str, can: list[str], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    bundle = open_bundle(tiny.bundle, check=False)
    said = replace(bundle, manifest=replace(bundle.manifest, precision=precision))
    monkeypatch.setattr(engine, "abilities", lambda: can)
    opened = engine.OpenVinoEngine(said)
    assert ("LP_TRANSFORMS_MODE" in opened._settings) is (precision == "int8" and can == ["avx2"])
