"""The pictures of a generation before they are drawn, each with its metadata and the plan of its loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from far_runtime.bundle import Manifest
from far_runtime.conditioning.subjects import Subject
from far_runtime.errors import FarError
from far_runtime.images.metadata import PictureMetadata
from far_runtime.sampling.base import Plan
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.settings import resolve_plan


@dataclass(frozen=True)
class PlannedPicture:
    """A picture that is to be drawn."""

    metadata: PictureMetadata
    """Everything that decides its bits."""
    plan: Plan
    """The steps of the loop under its settings."""


def resolve_plans(
    manifest: Manifest, sampling: Mapping[str, Any], count: int, kept: int = 0
) -> list[tuple[dict[str, Any], Plan]]:
    """The resolved settings and the plan of every picture, derived once for each scale of guidance.

    sampling: settings by name; guidance may be a sequence with a scale for each picture.
    count: number of pictures.
    kept: cells of a picture that an edit keeps.

    Raises FarError for invalid settings and for another number of scales than pictures.
    """
    scales = sampling.get("guidance")
    if not isinstance(scales, list | tuple | np.ndarray):
        return [resolve_plan(manifest, sampling, kept)] * count
    if len(scales) != count:
        raise FarError(f"{len(scales)} scales of guidance for {count} pictures; give one, or one per picture")
    numbers = [float(scale) for scale in scales]
    by_scale = {scale: resolve_plan(manifest, {**sampling, "guidance": scale}, kept) for scale in set(numbers)}
    return [by_scale[scale] for scale in numbers]


def plan_batches(
    subjects: Sequence[Subject],
    seeds: Sequence[int],
    plans: Sequence[tuple[dict[str, Any], Plan]],
    batch_size: int,
    surroundings: Mapping[str, Any],
    edited: Mapping[str, str] | None = None,
) -> list[list[PlannedPicture]]:
    """The pictures of a call, batch by batch; FarError for a seed that is out of range.

    surroundings: what `Pipeline.surroundings` returns.
    edited: what an edit started from, for the metadata.
    """
    count = len(subjects)
    checked_seeds = SeedNoise([int(seed) for seed in seeds]).seeds
    pictures = [
        PlannedPicture(
            PictureMetadata(
                label=subject.label,
                name=subject.name,
                negative=subject.negative,
                seed=seed,
                sampling=dict(settings),
                batch=min(batch_size, count - i // batch_size * batch_size),
                index=i % batch_size,
                edited=dict(edited or {}),
                **surroundings,
            ),
            plan,
        )
        for i, (subject, seed, (settings, plan)) in enumerate(zip(subjects, checked_seeds, plans, strict=True))
    ]
    return [pictures[start : start + batch_size] for start in range(0, count, batch_size)]
