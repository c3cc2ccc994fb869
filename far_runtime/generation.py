"""What a generation returns: pictures with the record of how they were made, and its progress while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from far_runtime.images.metadata import PictureMetadata
from far_runtime.sampling.base import Plan, Step


@dataclass(frozen=True)
class Progress:
    """How far a generation is; a unit of progress is a diffusion step, or a whole step where there are none."""

    batch: int
    """The batch that is drawn, from 0."""
    batches: int
    """Number of batches."""
    step: Step
    """The step of the loop."""
    steps: int
    """Number of steps of the loop."""
    inner: int
    """Units that are done of this step."""
    done: int
    """Units that are done of the whole generation."""
    total: int
    """Units of the whole generation."""


OnProgress = Callable[[Progress], None]
"""Called after every unit of progress."""

OnLevel = Callable[[int, NDArray[np.uint8]], None]
"""Called with the number of a step of the loop (from 0) and the pictures after it, uint8 [B, H, W, 3]."""


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
class Generation:
    """Pictures with the record of how they were made, in the order of the subjects."""

    images: NDArray[np.uint8]
    """Pixels [N, H, W, 3]."""
    latents: NDArray[np.float32]
    """What the pictures were decoded from [N, L, C], scaled."""
    settings: tuple[PictureMetadata, ...]
    """One record per picture."""
    level_latents: NDArray[np.float32] | None = None
    """The state after each step [N, steps, L, C], where asked for."""
    level_images: NDArray[np.uint8] | None = None
    """Pictures of the states [N, steps, H, W, 3], as the system's `preview_latents` shows them, where asked for."""
    step_names: tuple[str, ...] = ()
    """Names of the steps, such as "level 3"."""
    warnings: tuple[str, ...] = ()
    """What the user should know."""

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


def progress_reporter(
    plan: Plan, batches: int, on_progress: OnProgress | None
) -> Callable[[int], Callable[[Step, int], None]]:
    """For each batch, the function to call after every unit of progress, with the step and the units done of it."""
    per_batch = sum(step.substeps for step in plan)

    def of_batch(batch: int) -> Callable[[Step, int], None]:
        def report(step: Step, inner: int) -> None:
            if on_progress is None:
                return
            done = batch * per_batch + sum(earlier.substeps for earlier in plan[: step.index]) + inner
            progress = Progress(
                batch=batch,
                batches=batches,
                step=step,
                steps=len(plan),
                inner=inner,
                done=done,
                total=batches * per_batch,
            )
            on_progress(progress)

        return report

    return of_batch


def concatenate(batches: Sequence[Generation]) -> Generation:
    """The batches of one call as one generation."""
    level_latents = [batch.level_latents for batch in batches if batch.level_latents is not None]
    level_images = [batch.level_images for batch in batches if batch.level_images is not None]
    return Generation(
        images=np.concatenate([batch.images for batch in batches]),
        latents=np.concatenate([batch.latents for batch in batches]),
        settings=tuple(metadata for batch in batches for metadata in batch.settings),
        level_latents=np.concatenate(level_latents) if level_latents else None,
        level_images=np.concatenate(level_images) if level_images else None,
        warnings=tuple(dict.fromkeys(warning for batch in batches for warning in batch.warnings)),
    )
