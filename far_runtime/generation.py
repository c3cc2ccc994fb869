"""What drawing gives: pictures with their settings, and how far it is while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from far_runtime.images.metadata import PictureMetadata
from far_runtime.sampling.base import Plan, Step


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
class Watch:
    """What a caller wants to see of a generation while it runs."""

    on_progress: OnProgress | None = None
    """Called after every unit of progress."""
    on_level: OnLevel | None = None
    """Called with the pictures after every step, as soon as a batch has them, last with the finished ones."""
    save_levels: bool = False
    """Whether the states and pictures after every step are part of the result."""


@dataclass(frozen=True)
class PlannedPicture:
    """A picture that is to be drawn."""

    metadata: PictureMetadata
    """Everything that decides its bits."""
    plan: Plan
    """The steps of the loop under its settings."""


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


Preview = Callable[[Sequence[NDArray[np.float32]]], list[NDArray[np.float32]]]
"""What to decode to show the way to the picture, from the state after each step."""

Decode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
"""Latents [B, L, C] into pixels [B, H, W, 3]."""


class LevelRecorder:
    """Collects the state after each step of a batch, and shows it as pictures where somebody watches."""

    def __init__(self, steps: int, preview: Preview, decode: Decode, on_level: OnLevel | None) -> None:
        self._last, self._preview, self._decode, self._on_level = steps - 1, preview, decode, on_level
        self._states: list[NDArray[np.float32]] = []
        self._images: list[NDArray[np.uint8]] = []

    def add(self, state: NDArray[np.float32]) -> None:
        """Take the state after the next step."""
        self._states.append(state)
        step = len(self._states) - 1
        if self._on_level and step < self._last:
            # The preview shows the last state as it is, and the others as the next step sees them.
            preview = self._preview([*self._states, state])[step]
            self._images.append(self._decode(preview).copy())
            self._on_level(step, self._images[-1])

    def finish(self, generation: Generation, save_levels: bool) -> Generation:
        """The finished pictures, with those of all steps if `save_levels` asks for them."""
        if self._on_level:
            self._on_level(self._last, generation.images)
        if not save_levels:
            return generation
        images = self._images or [self._decode(view) for view in self._preview(self._states)[:-1]]
        return replace(
            generation,
            level_latents=np.stack(self._states, axis=1),
            level_images=np.stack([*images, generation.images], axis=1),
        )


def reporter(plan: Plan, batches: int, on_progress: OnProgress | None) -> Callable[[int], Callable[[Step, int], None]]:
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
