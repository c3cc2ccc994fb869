"""What the simulator runs, TensorRT-RTX compiles for real, on a machine without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from far_runtime.bundle import open_bundle
from far_runtime.engines.tensorrt.builder.build import build_engines
from far_runtime.engines.tensorrt.builder.options import BuildOptions

TARGETS = ("sm86", "sm89", "sm120")


@pytest.mark.slow
def test_every_stage_of_every_system_builds_for_three_gpus(
    system_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_rtx()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    bundle = open_bundle(shutil.copytree(system_bundle, tmp_path / "bundle"))
    engine = build_engines(bundle, "tensorrt-rtx", BuildOptions(targets=TARGETS))
    assert set(engine.notes) == {graph.name for graph in bundle.manifest.graphs}
    for graph in bundle.manifest.graphs:
        assert len(engine.read(graph.name)) == engine.notes[graph.name]["plan"] > 1000
        assert set(engine.notes[graph.name]["products"]) <= {graph.precision, "fp32"}


def needs_rtx() -> Any:
    pytest.importorskip("polygraphy")
    try:
        import tensorrt_rtx
    except (ImportError, OSError):
        pytest.skip("tensorrt_rtx is not there: it has wheels for x86-64 only")
    return tensorrt_rtx
