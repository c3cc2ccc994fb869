"""Whether a bundle draws the same distribution of pictures as its checkpoint in FP32, told by a Frechet distance.

Three sets of pictures of the same subjects: FP32 with the seeds A, the bundle with the seeds A, and FP32 with the seeds
B. distance(bundle A, FP32 B) stands beside distance(FP32 A, FP32 B): both compare pictures of different seeds, so the
second says what the distance of two sets of this size is where nothing has changed, and the ratio is 1 but for the
bundle's own error. The distance of the pairs, bundle A to FP32 A, is shown besides: it is far smaller, since the noise
is the same.

Features are the 1280 of efficientnet-lite0 (ImageNet), projected to the leading principal components of FP32 B, the set
that both are compared with: with a few hundred pictures the covariance of all 1280 would have no full rank. The figures
are named after that network and are no Inception FID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from far_export.evaluate.feature_cache import FeatureCache
from far_export.evaluate.features import SIDE, feature_network, features
from far_export.evaluate.metrics import COMPONENTS, frechet, principal_components
from far_export.stages.stage import Stage
from far_export.torch_engine import TorchEngine
from far_runtime import __version__
from far_runtime.bundle import Bundle
from far_runtime.conditioning.subjects import spread_subjects
from far_runtime.engines import open_engine
from far_runtime.engines.base import Engine, EngineOptions
from far_runtime.errors import FarError
from far_runtime.pipeline import Pipeline
from far_runtime.storage.atomic import user_cache

LIMIT = 1.5
SMALLEST = 2 * COMPONENTS
"""Fewer pictures than that do not tell the components apart."""

Draw = Callable[[Sequence[int]], NDArray[np.uint8]]
"""Pictures uint8 [N, H, W, 3] of the N subjects with these seeds."""


@dataclass(frozen=True)
class DistributionResult:
    """Distances of `count` pictures a set: bundle and FP32 with the seeds A to FP32 with the seeds B, and bundle to
    FP32 with the same seeds. limit: of the ratio."""

    count: int
    bundle: float
    reference: float
    paired: float
    limit: float = LIMIT

    @property
    def ratio(self) -> float:
        """distance(bundle A, FP32 B) / distance(FP32 A, FP32 B)."""
        return self.bundle / self.reference if self.reference else float("inf" if self.bundle else 1)

    @property
    def passed(self) -> bool:
        """Whether the bundle is as near as it has to be."""
        return self.ratio <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "ratio": self.ratio, "passed": self.passed}

    @property
    def sentence(self) -> str:
        """All figures in a line."""
        return (
            f"distribution of {self.count} pictures: distance to FP32 with other seeds {self.bundle:.2f}, of FP32 "
            f"itself {self.reference:.2f}, ratio {self.ratio:.3f} (limit {self.limit:g}); same seeds {self.paired:.2f}"
        )


def compare_distributions(
    bundle: Draw, reference: Draw, count: int, seed: int = 0, limit: float = LIMIT, cache: FeatureCache | None = None
) -> DistributionResult:
    """Draw the three sets and compare them. Seeds A are seed .. seed + count - 1, seeds B the `count` behind them.

    cache: keeps the features of the FP32 sets for the next bundle of the same checkpoint. Raises FarError where the
    feature network is not installed and for too few pictures.
    """
    network = check_possible(count)
    first, second = range(seed, seed + count), range(seed + count, seed + 2 * count)

    def of_reference(seeds: Sequence[int]) -> NDArray[np.float64]:
        kept = cache.find(seeds) if cache else None
        found = features(network, reference(seeds)) if kept is None else kept
        if cache and kept is None:
            cache.keep(seeds, found)
        return found

    ours = features(network, bundle(first))
    a, b = of_reference(first), of_reference(second)
    basis = principal_components(b)
    return DistributionResult(
        count, frechet(ours @ basis, b @ basis), frechet(a @ basis, b @ basis), frechet(ours @ basis, a @ basis), limit
    )


def check_possible(count: int, option: str = "--distribution") -> torch.nn.Module:
    """The feature network, before long work; FarError where it is missing, and for fewer pictures than make sense,
    which `option` changes."""
    if count < SMALLEST:
        raise FarError(f"{count} pictures for the distribution: expected {SMALLEST} or more; use {option} 256")
    return feature_network()


def check_distribution(
    bundle: Bundle,
    stages: Sequence[Stage],
    engine: str | Engine | None,
    settings: Mapping[str, Any],
    count: int,
    *,
    options: EngineOptions | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> DistributionResult:
    """The comparison of a bundle on an engine (open, or by its name) with its torch stages in FP32, over subjects
    spread over all classes, under resolved sampling settings.

    The features of FP32 pictures are kept in the user's cache folder, since they are the same for every bundle of a
    checkpoint. Raises FarError as `compare_distributions` does.
    """
    facts = {
        "weights": weights_digest(stages),
        "system": bundle.manifest.system,
        "settings": dict(settings),
        "subjects": [subject.caption for subject in spread_subjects(bundle.manifest, count)],
        "torch": torch.__version__,
        "features": [__version__, SIDE],
    }

    def drawing(opened: Callable[[], Engine]) -> Draw:
        def draw(seeds: Sequence[int]) -> NDArray[np.uint8]:
            with Pipeline(bundle, opened()) as pipeline:
                report(f"drawing {len(seeds)} pictures on {pipeline.engine.name}, seeds {seeds[0]} to {seeds[-1]}")
                return pipeline.generate(spread_subjects(bundle.manifest, len(seeds)), seeds, **settings).images

        return draw

    return compare_distributions(
        drawing(lambda: open_engine(bundle, engine, options) if isinstance(engine, str | None) else engine),
        drawing(lambda: TorchEngine(stages)),
        count,
        seed,
        cache=FeatureCache(user_cache() / "features", facts),
    )


def weights_digest(stages: Sequence[Stage]) -> str:
    """SHA-256 over all tensors of the stages' modules."""
    digest = hashlib.sha256()
    for stage in stages:
        for name, tensor in stage.module.state_dict().items():
            digest.update(f"{stage.name} {name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
