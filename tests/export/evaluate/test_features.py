"""Feature networks: efficientnet-lite0, and stand-ins that are called as Inception is. Inception's weights are not in
the tests."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from far_export.evaluate import inception as inception_module
from far_export.evaluate.features import FeatureExtractor, load_efficientnet
from far_export.evaluate.inception import inception
from far_runtime.errors import FarError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def test_lite_knows_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the true network
    from far_export.evaluate import features as networks

    network = networks.efficientnet_lite0()
    found = network(IMAGES)
    assert not network.inception
    assert found.features.shape == (5, network.width)
    assert found.features == pytest.approx(networks.extract_features(load_efficientnet(), IMAGES), abs=1e-5)
    assert found.probabilities.shape == (5, 1000)
    assert found.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-4)


class Scripted(torch.nn.Module):
    """Called as inception-2015-12-05.pt is."""

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        values = x.float().mean(dim=(2, 3))
        return values if return_features else (values + (0 if no_output_bias else 1)).softmax(1)


class Plain(torch.nn.Module):
    """A TorchScript that is called in another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_inception_as_torchscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "inception.pt"
    torch.jit.script(Scripted()).save(str(file))
    said: list[str] = []
    network = inception(file, said.append)
    found = network(IMAGES)
    assert network.inception
    assert network.width == 3
    assert found.features == pytest.approx(IMAGES.mean(axis=(1, 2)), rel=1e-5)
    assert len(said) == 1
    assert "SHA-256" in said[0]
    monkeypatch.setattr(inception_module, "KNOWN", (network.digest,))
    inception(file, said.append)
    assert len(said) == 1


def test_files_that_are_no_inception(tmp_path: Path) -> None:
    torch.jit.script(Plain()).save(str(tmp_path / "plain.pt"))
    with pytest.raises(FarError, match="is not called as"):
        inception(tmp_path / "plain.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(FarError, match="pip install torch-fidelity"):
        inception(tmp_path / "weights.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(FarError, match="neither TorchScript nor weights"):
        inception(tmp_path / "text.pth")
    with pytest.raises(FarError, match="no such file"):
        inception(tmp_path / "none.pt")


class Fidelity(torch.nn.Module):
    """Stands in for torch-fidelity's network, which unpickles whatever it is given."""

    def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features == ["2048", "logits_unbiased"]
        self.fc = torch.nn.Linear(3, 4)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = x.float().mean(dim=(2, 3))
        return values, values @ self.fc.weight.T


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = SimpleNamespace(FeatureExtractorInceptionV3=Fidelity)
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


def test_inception_as_weights(tmp_path: Path, fidelity: None) -> None:
    weights = torch.nn.Linear(3, 4).state_dict()
    torch.save({f"fc.{name}": tensor for name, tensor in weights.items()}, tmp_path / "weights.pth")
    network: FeatureExtractor = inception(tmp_path / "weights.pth")
    found = network(IMAGES)
    means = torch.from_numpy(IMAGES).float().mean(dim=(1, 2))
    assert found.features == pytest.approx(means.numpy(), rel=1e-5)
    assert found.probabilities == pytest.approx((means @ weights["weight"].T).softmax(1).numpy(), rel=1e-4)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(FarError, match="holds other weights"):
        inception(tmp_path / "other.pth")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_weight_file_is_executed(tmp_path: Path, fidelity: None) -> None:
    torch.save({"fc.weight": Touch(tmp_path / "executed")}, tmp_path / "bad.pth")
    with pytest.raises(FarError, match="neither TorchScript nor weights"):
        inception(tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()
