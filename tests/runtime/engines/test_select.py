"""Without --engine the best engine that is installed draws, and says so."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from far_runtime.bundle import Bundle, open_bundle
from far_runtime.cli.engine_options import choice_line
from far_runtime.engines import open_engine
from far_runtime.engines import select as choice
from far_runtime.engines.select import choose, folder_of
from far_runtime.errors import FarError

Machine = Callable[..., None]


@pytest.fixture
def bundle(tiny: Any) -> Bundle:
    return open_bundle(tiny.bundle)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Says what is installed and what the machine is."""

    def set_up(
        *installed: str, cpu: str = "x86_64", gpu: bool = False, cuda: bool = False, built: tuple[str, ...] = ()
    ) -> None:
        monkeypatch.setattr(choice, "built_engine", lambda bundle, library: library in built or None)
        folder = tmp_path / "onnxruntime"
        (folder / "capi").mkdir(parents=True, exist_ok=True)
        if cuda:
            (folder / "capi" / "libonnxruntime_providers_cuda.so").touch()
        monkeypatch.setattr(choice, "folder_of", lambda name: folder if name in installed else None)
        monkeypatch.setattr(platform, "machine", lambda: cpu)
        monkeypatch.setattr(choice, "has_gpu", lambda: gpu)

    return set_up


@pytest.mark.parametrize(
    ("installed", "more", "expected"),
    [
        (("openvino", "onnxruntime"), {}, "openvino:cpu"),
        (("onnxruntime",), {}, "onnxruntime:cpu"),
        (("openvino",), {}, "openvino:cpu"),
        (("openvino", "onnxruntime"), {"cpu": "aarch64"}, "onnxruntime:cpu"),
        (("openvino",), {"cpu": "aarch64"}, "openvino:cpu"),
        (("openvino", "onnxruntime"), {"gpu": True, "cuda": True}, "onnxruntime:cuda"),
        (("openvino", "onnxruntime"), {"gpu": True}, "openvino:cpu"),
        (("tensorrt_rtx", "onnxruntime"), {"gpu": True, "cuda": True, "built": ("tensorrt-rtx",)}, "tensorrt-rtx"),
        (("tensorrt_rtx", "onnxruntime"), {"gpu": True, "cuda": True, "built": ("tensorrt",)}, "onnxruntime:cuda"),
        (("tensorrt_rtx", "onnxruntime"), {"built": ("tensorrt-rtx",)}, "onnxruntime:cpu"),
        (("openvino", "onnxruntime"), {"cuda": True}, "openvino:cpu"),
    ],
)
def test_the_best_engine_that_is_there(
    bundle: Bundle, machine: Machine, installed: tuple[str, ...], more: dict[str, Any], expected: str
) -> None:
    machine(*installed, **more)
    assert choose(bundle).name == expected


def test_bf16_graphs_go_to_an_engine_that_computes_them(bundle: Bundle, machine: Machine) -> None:
    bf16 = replace(bundle, manifest=replace(bundle.manifest, precision="bf16"))
    machine("openvino", "onnxruntime", cpu="aarch64")
    assert choose(bf16).name == "openvino:cpu"
    machine("onnxruntime")
    with pytest.raises(FarError, match=r"BF16.*onnxruntime cannot.*pip install 'far-deploy\[openvino\]'"):
        choose(bf16)


def test_a_graph_per_level_does_not_fill_the_memory(
    bundle: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO holds the weights once a graph, ONNX Runtime maps one file."""
    graphs = tuple(replace(graph, parameters=10**9) for graph in bundle.manifest.graphs)
    large = replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
    machine("openvino", "onnxruntime")
    monkeypatch.setattr(choice, "total_memory", lambda: 16e9)
    assert choose(large).name == "onnxruntime:cpu" and "GB of weights, a copy a graph" in choose(large).reason
    monkeypatch.setattr(choice, "total_memory", lambda: 1e12)
    assert choose(large).name == "openvino:cpu"


def test_only_an_engine_that_fits_is_built(bundle: Bundle) -> None:
    assert choice.built_engine(bundle, "tensorrt-rtx") is None


def test_nothing_installed_is_said_with_the_commands(bundle: Bundle, machine: Machine) -> None:
    machine()
    with pytest.raises(FarError, match=r"no engine is installed; .*pip install 'far-deploy\[openvino\]'"):
        choose(bundle)


def test_the_chosen_engine_is_what_opens(bundle: Bundle) -> None:
    pytest.importorskip("onnxruntime")
    named = choose(bundle)
    assert open_engine(bundle).name == named.name
    assert choice_line(named) == f"engine {named.name}: {named.reason}; --engine chooses another"


def test_a_library_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stubs = tmp_path / "whole_engine", tmp_path / "stubs_only"
    whole.mkdir()
    stubs.mkdir()
    (whole / "__init__.py").write_text("raise RuntimeError('imported')")
    (stubs / "__init__.pyi").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert folder_of("whole_engine") == whole
    assert folder_of("stubs_only") is None
    assert folder_of("no_such_engine") is None
    assert "whole_engine" not in sys.modules


def test_the_line_is_said_unless_quiet(tiny: Any, far: Any) -> None:
    pytest.importorskip("onnxruntime")
    options = ("--label", "0", "--threads", "1")
    said = far("generate", tiny.bundle, *options)
    last = said.out.splitlines()[-1]
    assert said.code == 0 and last.startswith("engine ") and last.endswith("; --engine chooses another")
    assert far("generate", tiny.bundle, *options, "--quiet").out == ""
    assert "chooses another" not in far("generate", tiny.bundle, *options, "--engine", "onnxruntime").out


def test_like_keeps_the_engine_of_the_picture(tiny: Any, far: Any) -> None:
    pytest.importorskip("onnxruntime")
    made = far(
        "generate", tiny.bundle, "--label", "0", "--engine", "onnxruntime", "-q", "-o", "one.png", "--each", "each"
    )
    assert made.code == 0, made.err
    picture = next(Path("each").iterdir())
    again = far("generate", tiny.bundle, "--like", picture, "-o", "again.png")
    assert (
        "repeated bit for bit" in again.out and "on onnxruntime:cpu" in again.out and "chooses another" not in again.out
    )
