"""Pictures and measurements of a zoo card: samples, nearest training pictures, reconstructions, distances."""

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
    """Drawn pictures, and the nearest training picture of each."""

    pictures: NDArray[np.uint8]
    """Pixels [N, S, S, 3]."""

    labels: NDArray[np.int64]
    """Labels that were asked for, [N]."""

    nearest: NDArray[np.int64]
    """Index of the nearest training picture, [N]."""

    distance: NDArray[np.float64]
    """Distance to it as `nearest` measures it, [N]."""


@contextmanager
def drawing(
    model: Path, vae: Path, text_encoder: Path | None, data: PictureSet, threads: int | None = None
) -> Iterator[Draw]:
    """A function that draws pictures of labels with a bundle of these checkpoints, on the best engine of this machine.

    With a text encoder it draws from the prompts of `prompts_for`. threads: number of the engine's threads.
    """
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
    """A prompt for every label and seed: prompt number `seed` of the label's training pictures, modulo their number."""
    prompts = np.array(prompts_of(data))
    by_label = [prompts[data.train[data.labels[data.train] == label]] for label in labels]
    return [str(choice[seed % len(choice)]) for choice, seed in zip(by_label, seeds, strict=True)]


def nearest(
    pictures: NDArray[np.uint8], pool: NDArray[np.uint8], skip_self: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The nearest of `pool` [M, S, S, 3] for each picture [N, S, S, 3]: indices and distances, both [N].

    The distance is the root mean square difference of pixel values (0 to 255) of the picture or its mirror image,
    whichever is smaller. With `skip_self`, picture i is pool[i] and is not compared with itself.
    """
    flat = pool.reshape(len(pool), -1).astype(np.float32)
    norms = (flat**2).sum(1)
    indices, distances = [], []
    for start in range(0, len(pictures), 256):
        part = pictures[start : start + 256].astype(np.float32)
        squares = (part.reshape(len(part), -1) ** 2).sum(1)[:, None]
        sides = (part.reshape(len(part), -1), part[:, :, ::-1].reshape(len(part), -1))
        error = np.minimum(*(squares + norms - 2 * side @ flat.T for side in sides))
        if skip_self:
            error[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        indices.append(error.argmin(1))
        distances.append(np.sqrt(np.maximum(error.min(1), 0) / flat.shape[1]))
    return np.concatenate(indices), np.concatenate(distances).astype(np.float64)


def drawn_samples(draw: Draw, data: PictureSet, per_class: int) -> Samples:
    """`per_class` samples of every class, in rounds over the classes with the seeds 0, 1, 2, ..."""
    labels = np.tile(np.arange(len(data.names)), per_class)
    pictures = draw(labels.tolist(), list(range(len(labels))))
    indices, distance = nearest(pictures, data.read(data.train))
    return Samples(pictures, labels, indices, distance)


def sample_figures(samples: Samples, data: PictureSet, out: Path) -> dict[str, Any]:
    """Write samples.webp (one of each class) and nearest.webp, and measure how near samples are to training pictures.

    "missed" lists the classes none of whose samples is nearest to a training picture of that class.
    """
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
    """Write reconstructions.webp; returns the mean PSNR of training and held-out pictures in dB."""
    save_picture(comparison(vae, data, evenly(data.train, 32)), out / "reconstructions.webp")
    numbers = {"psnr_train": reconstruction_psnr(vae, data, data.train)}
    held = others if others is not None and len(others.held_out) else data
    if len(held.held_out):
        numbers |= {"psnr_held_out": reconstruction_psnr(vae, held, held.held_out), "held_out": len(held.held_out)}
    return numbers


def distance_figures(samples: Samples, vae: nn.Module, data: PictureSet) -> dict[str, float]:
    """Frechet distances of the samples, and of the training pictures' reconstructions, to the training pictures.

    They are taken over the 48 leading principal components of the training pictures' efficientnet-lite0 features.
    """
    network = load_efficientnet()
    wanted = extract_features(network, data.read(data.train))
    basis = principal_components(wanted)
    sets = {"frechet_samples": samples.pictures, "frechet_reconstructions": reconstruct(vae, data, data.train)}
    return {
        name: frechet_from_features(extract_features(network, found) @ basis, wanted @ basis)
        for name, found in sets.items()
    }
