"""What the tests of far_runtime share: pipelines over the tiny bundles, copies of them to damage, and the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from far_runtime.cli.main import main
from far_runtime.pipeline import Pipeline


@pytest.fixture(scope="session")
def pipeline(tiny: Any) -> Iterator[Pipeline]:
    """Unmasked variant on ONNX Runtime, one thread."""
    with Pipeline.from_bundle(tiny.bundle, "onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def masked_pipeline(tiny: Any) -> Iterator[Pipeline]:
    """Masked variant with a graph per level."""
    with Pipeline.from_bundle(tiny.masked_bundle, "onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def mar_pipeline(tiny: Any) -> Iterator[Pipeline]:
    """MAR, several tokens at each of its iterations."""
    with Pipeline.from_bundle(tiny.mar_bundle, "onnxruntime", threads=1) as opened:
        yield opened


PIPELINES = {"unmasked": "pipeline", "masked": "masked_pipeline", "mar": "mar_pipeline"}


@pytest.fixture(params=["unmasked", "masked"])
def far_pipeline(request: pytest.FixtureRequest) -> Pipeline:
    """Both variants of FAR, one after the other."""
    opened: Pipeline = request.getfixturevalue(PIPELINES[request.param])
    return opened


@pytest.fixture(params=list(PIPELINES))
def any_pipeline(request: pytest.FixtureRequest) -> Pipeline:
    """Both variants of FAR, and MAR."""
    opened: Pipeline = request.getfixturevalue(PIPELINES[request.param])
    return opened


@pytest.fixture
def bundle_copy(tiny: Any, tmp_path: Path) -> Path:
    """A copy of the unmasked bundle that a test may damage."""
    return Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))


@dataclass(frozen=True)
class Result:
    """Exit code and output of one command."""

    code: int
    out: str
    err: str


Far = Callable[..., Result]


@pytest.fixture
def far(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Far:
    """The command as the console script runs it, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(int(caught.value.code or 0), out, err)

    return run
