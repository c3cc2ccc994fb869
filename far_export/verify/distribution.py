"""Whether a bundle draws the same distribution of pictures as its checkpoint in FP32, measured by a Frechet distance.

Three sets of pictures of the same subjects are drawn: FP32 with the seeds A, the bundle with the seeds A, and FP32 with
the seeds B. The result is the ratio distance(bundle A, FP32 B) / distance(FP32 A, FP32 B). Both distances compare
pictures of different seeds, so the second is what two sets of this size differ by where nothing has changed, and the
ratio is 1 but for the bundle's own error. The distance of the bundle A to FP32 A is shown as well; it is far smaller,
since the noise is the same.

Features are the 1280 of efficientnet-lite0 (ImageNet), projected to the leading principal components of FP32 B: with a
few hundred pictures the covariance of all 1280 would not have full rank. The figures are named after that network and
are not comparable with the Inception FID.
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
from far_export.evaluate.features import SIDE, extract_features, load_efficientnet
from far_export.evaluate.metrics import COMPONENTS, frechet_from_features, principal_components
from far_export.stages.stage import Stage
from far_export.torch_engine import TorchEngine
from far_runtime import __version__
from far_runtime.bundle import Bundle
from far_runtime.conditioning.subjects import spread_subjects
from far_runtime.engines import open_engine
from far_runtime.engines.base import Engine, EngineOptions
from far_runtime.engines.select import Choice
from far_runtime.errors import FarError
from far_runtime.pipeline import Pipeline
from far_runtime.storage.atomic import user_cache

LIMIT = 1.5
"""The largest ratio that passes."""
MIN_COUNT = 2 * COMPONENTS
"""Pictures that a set needs so that its covariance has full rank."""

DrawPictures = Callable[[Sequence[int]], NDArray[np.uint8]]
"""Draws pictures uint8 [N, H, W, 3] of N subjects with these N seeds."""


@dataclass(frozen=True)
class DistributionResult:
    """Frechet distances between three sets of pictures."""

    count: int
    """Pictures in each set."""
    bundle: float
    """Distance of the bundle with the seeds A to FP32 with the seeds B."""
    reference: float
    """Distance of FP32 with the seeds A to FP32 with the seeds B."""
    paired: float
    """Distance of the bundle to FP32 with the same seeds A."""
    limit: float = LIMIT
    """The largest ratio that passes."""

    @property
    def ratio(self) -> float:
        """distance(bundle A, FP32 B) / distance(FP32 A, FP32 B)."""
        return self.bundle / self.reference if self.reference else float("inf" if self.bundle else 1)

    @property
    def passed(self) -> bool:
        """Whether the ratio is within the limit."""
        return self.ratio <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "ratio": self.ratio, "passed": self.passed}

    @property
    def sentence(self) -> str:
        """All figures in one line."""
        return (
            f"distribution of {self.count} pictures: distance to FP32 with other seeds {self.bundle:.2f}, of FP32 "
            f"itself {self.reference:.2f}, ratio {self.ratio:.3f} (limit {self.limit:g}); same seeds {self.paired:.2f}"
        )


def compare_distributions(
    draw_bundle: DrawPictures,
    draw_reference: DrawPictures,
    count: int,
    seed: int = 0,
    limit: float = LIMIT,
    cache: FeatureCache | None = None,
) -> DistributionResult:
    """Draw the three sets of `count` pictures and compare them.

    Seeds A start at `seed`, seeds B follow them. The cache keeps the features of the FP32 sets for other bundles of the
    same checkpoint. Raises FarError where the feature network is not installed and for too few pictures.
    """
    network = check_possible(count)
    seeds_a, seeds_b = range(seed, seed + count), range(seed + count, seed + 2 * count)

    def reference_features(seeds: Sequence[int]) -> NDArray[np.float64]:
        cached = cache.find(seeds) if cache else None
        if cached is not None:
            return cached
        computed = extract_features(network, draw_reference(seeds))
        if cache:
            cache.keep(seeds, computed)
        return computed

    bundle_a = extract_features(network, draw_bundle(seeds_a))
    reference_a, reference_b = reference_features(seeds_a), reference_features(seeds_b)
    basis = principal_components(reference_b)
    bundle_a, reference_a, reference_b = bundle_a @ basis, reference_a @ basis, reference_b @ basis
    return DistributionResult(
        count=count,
        bundle=frechet_from_features(bundle_a, reference_b),
        reference=frechet_from_features(reference_a, reference_b),
        paired=frechet_from_features(bundle_a, reference_a),
        limit=limit,
    )


def check_possible(count: int, option: str = "--distribution") -> torch.nn.Module:
    """The feature network. Called before long work: raises FarError where the network is not installed, and for too few
    pictures, whose number `option` sets."""
    if count < MIN_COUNT:
        raise FarError(f"{count} pictures for the distribution: expected {MIN_COUNT} or more; use {option} 256")
    return load_efficientnet()


def check_distribution(
    bundle: Bundle,
    stages: Sequence[Stage],
    engine: str | Choice | Engine | None,
    settings: Mapping[str, Any],
    count: int,
    *,
    options: EngineOptions | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> DistributionResult:
    """Compare a bundle on an engine with its torch stages in FP32, over subjects spread over all classes.

    engine: an open engine, or the name of one.
    settings: resolved sampling settings.
    report: called with every line of progress.

    The features of FP32 pictures are kept in the user's cache folder, since they are the same for every bundle of a
    checkpoint. Raises FarError as `compare_distributions` does.
    """
    cache_key = {
        "weights": weights_digest(stages),
        "system": bundle.manifest.system,
        "settings": dict(settings),
        "subjects": [subject.caption for subject in spread_subjects(bundle.manifest, count)],
        "torch": torch.__version__,
        "features": [__version__, SIDE],
    }

    def draw_on(open_it: Callable[[], Engine]) -> DrawPictures:
        def draw(seeds: Sequence[int]) -> NDArray[np.uint8]:
            with Pipeline(bundle, open_it()) as pipeline:
                report(f"drawing {len(seeds)} pictures on {pipeline.engine.name}, seeds {seeds[0]} to {seeds[-1]}")
                return pipeline.generate(spread_subjects(bundle.manifest, len(seeds)), seeds, **settings).images

        return draw

    return compare_distributions(
        draw_on(lambda: open_engine(bundle, engine, options) if isinstance(engine, str | Choice | None) else engine),
        draw_on(lambda: TorchEngine(stages)),
        count,
        seed,
        cache=FeatureCache(user_cache() / "features", cache_key),
    )


def weights_digest(stages: Sequence[Stage]) -> str:
    """SHA-256 of all tensors of the stages' modules, as hexadecimal text."""
    digest = hashlib.sha256()
    for stage in stages:
        for name, tensor in stage.module.state_dict().items():
            digest.update(f"{stage.name} {name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
