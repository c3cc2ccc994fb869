"""What drawing gives: pictures with their settings, and how far it is while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from far_runtime.images.metadata import PictureMetadata
from far_runtime.sampling.base import Step


@dataclass(frozen=True)
class Progress:
    """How far `generate` is: `inner` units (diffusion steps) of `step`, one of `steps` steps of the loop, in `batch`
    (from 0) of `batches`; in all `done` of `total` units."""

    batch: int
    batches: int
    step: Step
    steps: int
    inner: int
    done: int
    total: int


OnProgress = Callable[[Progress], None]

OnLevel = Callable[[int, NDArray[np.uint8]], None]
"""Called with the number of a step of the loop (from 0) and what the pictures are after it, uint8 [B, H, W, 3]."""


@dataclass(frozen=True)
class Generation:
    """Pictures with what they came from, in the order of the subjects.

    images: uint8 [N, H, W, 3]. latents: float32 [N, ...], what was decoded (continuous systems: [N, L, C], scaled).
    settings: one per picture. Where asked for, and None otherwise, level_latents: [N, steps, ...], the state after each
    step; level_images: uint8 [N, steps, H, W, 3], the way to the picture as the system's `preview_latents` shows it.
    step_names: what the steps are called. warnings: what the user should know.
    """

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]
    settings: tuple[PictureMetadata, ...]
    level_latents: NDArray[np.float32] | None = None
    level_images: NDArray[np.uint8] | None = None
    step_names: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __getitem__(self, rows: slice) -> Generation:
        """Some of the pictures."""
        return replace(
            self,
            images=self.images[rows],
            latents=self.latents[rows],
            settings=self.settings[rows],
            level_latents=None if self.level_latents is None else self.level_latents[rows],
            level_images=None if self.level_images is None else self.level_images[rows],
        )


def reporter(
    plan: Sequence[Step], batches: int, on_progress: OnProgress | None
) -> Callable[[int], Callable[[Step, int], None]]:
    """For each batch, what to call after every unit of a step."""
    per_batch = sum(step.substeps for step in plan)

    def of_batch(batch: int) -> Callable[[Step, int], None]:
        def report(step: Step, inner: int) -> None:
            if on_progress is not None:
                done = batch * per_batch + sum(before.substeps for before in plan[: step.index]) + inner
                on_progress(Progress(batch, batches, step, len(plan), inner, done, batches * per_batch))

        return report

    return of_batch


def joined(parts: Sequence[Generation]) -> Generation:
    """The batches of one call as one."""
    level_latents = [part.level_latents for part in parts if part.level_latents is not None]
    level_images = [part.level_images for part in parts if part.level_images is not None]
    return Generation(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.latents for part in parts]),
        tuple(one for part in parts for one in part.settings),
        np.concatenate(level_latents) if level_latents else None,
        np.concatenate(level_images) if level_images else None,
        warnings=tuple(dict.fromkeys(warning for part in parts for warning in part.warnings)),
    )
