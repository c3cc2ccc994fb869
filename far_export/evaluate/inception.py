"""The Inception of 2015-12-05, whose metrics are FID and inception score, from either file that is in use."""

from __future__ import annotations

import importlib
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from far_export.evaluate.features import FeatureExtractor, Network, best_device
from far_runtime.bundle import sha256_of
from far_runtime.errors import FarError

KNOWN = (
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",  # k_diffusion/evaluation.py, of the .pt
    "6726825d",  # of the .pth, whose name ends in it, as torch.hub wants it
)
"""How the SHA-256 of the two files begin."""


def inception(path: Path, say: Callable[[str], None] = lambda line: None) -> FeatureExtractor:
    """The network in one of two files; FarError for a file that is neither.

    `inception-2015-12-05.pt` is TorchScript, a program that runs; it is called as stylegan3's metrics call it.
    `pt_inception-2015-12-05-6726825d.pth` holds weights, for torch-fidelity's network. `say` is called with a warning
    where the file has another SHA-256 than these two.
    """
    if not path.is_file():
        raise FarError(f"--inception {path}: no such file; give inception-2015-12-05.pt (TorchScript)")
    digest = sha256_of(path)
    if not digest.startswith(KNOWN):
        say(
            f"warning: {path}: its SHA-256 ({digest[:16]}..) is not that of inception-2015-12-05.pt or "
            "pt_inception-2015-12-05-6726825d.pth: its figures may not be comparable"
        )
    network = _from_torchscript(path) or _from_weights(path)
    return FeatureExtractor("inception", _width(network, path), digest[:16], True, network)


def _from_torchscript(path: Path) -> Network | None:
    """None where the file holds no TorchScript."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript itself
            script: Any = torch.jit.load(str(path), map_location=best_device()).eval()
    except RuntimeError:
        return None

    def compute(pictures: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return script(pictures, return_features=True), script(pictures, no_output_bias=True)
        except RuntimeError as error:
            raise FarError(
                f"--inception {path}: is not called as inception-2015-12-05.pt is ({str(error).splitlines()[0]})"
            ) from error

    return compute


def _width(network: Network, path: Path) -> int:
    features, probabilities = network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=best_device()))
    if features.ndim != 2 or probabilities.ndim != 2:
        raise FarError(f"--inception {path}: gives features {list(features.shape)}; expected [N, D]")
    return int(features.shape[1])


def _from_weights(path: Path) -> Network:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise FarError(
            f"--inception {path}: is neither TorchScript nor weights ({str(error).splitlines()[0]}); give "
            "inception-2015-12-05.pt"
        ) from error
    network = _torch_fidelity_network(path, state).to(best_device()).eval()

    def compute(pictures: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(pictures)
        return features, logits.softmax(1)

    return compute


def _torch_fidelity_network(path: Path, state: Any) -> Any:
    """torch-fidelity's network with these weights.

    torch-fidelity would unpickle the user's file, and so gets a copy that holds nothing but tensors.
    """
    try:
        module: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise FarError(
            f"--inception {path}: is no TorchScript, and {error.name}, which reads "
            "pt_inception-2015-12-05-6726825d.pth, is not installed; pip install torch-fidelity, or give "
            "inception-2015-12-05.pt"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(state, copy)
        try:
            return module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy)
            )
        except (RuntimeError, TypeError, AttributeError) as error:  # of load_state_dict
            raise FarError(
                f"--inception {path}: holds other weights than pt_inception-2015-12-05-6726825d.pth "
                f"({str(error).splitlines()[0]})"
            ) from error
