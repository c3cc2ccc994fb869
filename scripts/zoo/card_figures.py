"""What a zoo card shows and measures: samples, their nearest training pictures, reconstructions, distances."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from far_export.evaluate.features import extract_features, load_efficientnet
from far_export.evaluate.metrics import frechet_from_features, principal_components
from far_export.export import export_bundle
from far_models.pictures import PictureSet
from far_models.reconstruction import comparison, evenly, reconstruct, reconstruction_psnr, save_picture, tile
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.select import best_unless
from far_runtime.pipeline import Pipeline
from far_training.data.prompts import prompts_of

Draw = Callable[..., NDArray[np.uint8]]
"""draw(labels [N], seeds [N], **sampling settings) -> pictures uint8 [N, S, S, 3]."""


@dataclass(frozen=True)
class Samples:
    """Pictures [N, S, S, 3] with the labels that were asked for, and each one's nearest training picture."""

    pictures: NDArray[np.uint8]
    labels: NDArray[np.int64]
    nearest: NDArray[np.int64]
    distance: NDArray[np.float64]


@contextmanager
def drawing(
    model: Path, vae: Path, text_encoder: Path | None, data: PictureSet, threads: int | None = None
) -> Iterator[Draw]:
    """Draws pictures of labels with a bundle of these checkpoints, on the best engine here; from prompts
    (`prompts_for`) where there is a text encoder. threads: of the engine."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_bundle(model, vae, Path(folder) / "bundle", text_encoder=text_encoder, editing=False)
        engine = best_unless(None, bundle).name
        with Pipeline.over(bundle, engine, EngineOptions(threads=threads)) as pipeline:

            def draw(labels: Sequence[int], seeds: Sequence[int], **settings: Any) -> NDArray[np.uint8]:
                subjects: list[int | str] = list(labels)
                if text_encoder:
                    subjects = list(prompts_for(data, labels, seeds))
                return pipeline.generate(subjects, seeds, batch_size=16, **settings).images

            yield draw


def prompts_for(data: PictureSet, labels: Sequence[int], seeds: Sequence[int]) -> list[str]:
    """A prompt for every label and seed: seed s takes the prompts of the label's training pictures in turn."""
    prompts = np.array(prompts_of(data))
    own = [prompts[data.train[data.labels[data.train] == label]] for label in labels]
    return [str(choice[seed % len(choice)]) for choice, seed in zip(own, seeds, strict=True)]


def nearest(
    pictures: NDArray[np.uint8], pool: NDArray[np.uint8], skip_self: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each picture [N, S, S, 3] the nearest of `pool` [M, S, S, 3]: its index and its distance, both [N].

    The distance is the root mean square difference of pixel values (0 to 255), of the picture or its mirror image.
    `skip_self`: picture i is pool[i], which does not count.
    """
    flat = pool.reshape(len(pool), -1).astype(np.float32)
    norms = (flat**2).sum(1)
    indices, distances = [], []
    for start in range(0, len(pictures), 256):
        part = pictures[start : start + 256].astype(np.float32)
        own = (part.reshape(len(part), -1) ** 2).sum(1)[:, None]
        sides = (part.reshape(len(part), -1), part[:, :, ::-1].reshape(len(part), -1))
        error = np.minimum(*(own + norms - 2 * side @ flat.T for side in sides))
        if skip_self:
            error[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        indices.append(error.argmin(1))
        distances.append(np.sqrt(np.maximum(error.min(1), 0) / flat.shape[1]))
    return np.concatenate(indices), np.concatenate(distances).astype(np.float64)


def drawn_samples(draw: Draw, data: PictureSet, per_class: int) -> Samples:
    """`per_class` samples of every class, seed 0 and so on in the order of the classes, class after class."""
    labels = np.tile(np.arange(len(data.names)), per_class)
    pictures = draw(labels.tolist(), list(range(len(labels))))
    found, distance = nearest(pictures, data.read(data.train))
    return Samples(pictures, labels, found, distance)


def sample_figures(samples: Samples, data: PictureSet, out: Path) -> dict[str, Any]:
    """Write samples.webp (one of each class) and nearest.webp; how near the samples are to which training pictures, and
    the classes none of whose samples is nearest to a picture of its own."""
    classes = len(data.names)
    save_picture(tile(samples.pictures[:classes], 16), out / "samples.webp")
    pool = data.read(data.train)
    _, apart = nearest(pool, pool, skip_self=True)
    chosen = np.linspace(0, classes - 1, 48).round().astype(int)
    pairs = np.stack([samples.pictures[chosen], pool[samples.nearest[chosen]]], axis=1)
    save_picture(tile(pairs.reshape(-1, *pairs.shape[2:]), 16), out / "nearest.webp")
    same = data.labels[data.train][samples.nearest] == samples.labels
    missed = [data.names[label] for label in range(classes) if not same[samples.labels == label].any()]
    return {
        "samples": len(same),
        "same_class": float(same.mean()),
        "missed": missed,
        "distance": float(np.median(samples.distance)),
        "closest": float(samples.distance.min()),
        "apart": float(np.median(apart)),
    }


def reconstruction_figures(vae: nn.Module, data: PictureSet, others: PictureSet | None, out: Path) -> dict[str, float]:
    """Write reconstructions.webp; mean PSNR in dB of training and held-out pictures."""
    save_picture(comparison(vae, data, evenly(data.train, 32)), out / "reconstructions.webp")
    numbers = {"psnr_train": reconstruction_psnr(vae, data, data.train)}
    held = others if others is not None and len(others.held_out) else data
    if len(held.held_out):
        numbers |= {"psnr_held_out": reconstruction_psnr(vae, held, held.held_out), "held_out": len(held.held_out)}
    return numbers


def distance_figures(samples: Samples, vae: nn.Module, data: PictureSet) -> dict[str, float]:
    """Frechet distances to the training pictures of the samples and of the training pictures' reconstructions, on the
    48 leading principal components of efficientnet-lite0's features of the training pictures."""
    network = load_efficientnet()
    wanted = extract_features(network, data.read(data.train))
    basis = principal_components(wanted)
    sets = {"frechet_samples": samples.pictures, "frechet_reconstructions": reconstruct(vae, data, data.train)}
    return {
        name: frechet_from_features(extract_features(network, found) @ basis, wanted @ basis)
        for name, found in sets.items()
    }
