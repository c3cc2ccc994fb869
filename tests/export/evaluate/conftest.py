"""A feature network that takes no time, pictures to compare with, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from far_export.evaluate import features as networks
from far_export.evaluate.features import FeatureExtractor
from far_runtime.cli.main import cli
from far_runtime.errors import FarError

Run = Callable[..., Result]


@pytest.fixture
def colours() -> FeatureExtractor:
    """Features: mean and deviation of the three colours."""

    def compute(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = pictures.float() / 255
        features = torch.cat([values.mean(dim=(2, 3)), values.std(dim=(2, 3))], dim=1)
        return features, features.softmax(1)

    return FeatureExtractor("colours", 6, "none", False, compute)


@pytest.fixture(autouse=True)
def quick(colours: FeatureExtractor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command takes that network, and a cache of its own."""
    monkeypatch.setattr(networks, "efficientnet_lite0", lambda: colours)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of three classes, four of them held out."""
    path = tmp_path / "pictures"
    path.mkdir()
    np.save(path / "images.npy", np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    np.save(path / "labels.npy", np.arange(12) % 3)
    (path / "split.json").write_text(json.dumps({"train": list(range(8)), "held_out": [8, 9, 10, 11]}))
    return path


@pytest.fixture
def run() -> Run:
    """far evaluate with these arguments."""
    return lambda *arguments: CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


@pytest.fixture
def error_of(run: Run) -> Callable[..., str]:
    """What far evaluate says is wrong with these arguments."""

    def message(*arguments: object) -> str:
        result = run(*arguments)
        assert isinstance(result.exception, FarError), result.output
        return str(result.exception)

    return message
