"""Jobs: the pictures that a request queues, one job for each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.conditioning.subjects import Subject
from far_runtime.images.edit import Edit
from far_runtime.images.metadata import PictureMetadata

Pixels = NDArray[np.uint8]

OnLevel = Callable[[int, Pixels], None]
"""Called on the batcher's thread after a step of the loop, with the step's number and the picture [H, W, 3]."""


@dataclass(frozen=True)
class JobResult:
    """A finished picture."""

    pixels: Pixels
    """[H, W, 3]."""

    settings: PictureMetadata
    """What the picture was made with."""

    waited: float
    """Seconds in the queue."""

    seconds: float
    """Seconds that its batch took."""

    stages: Mapping[str, float]
    """Seconds of its batch in each stage."""

    warnings: tuple[str, ...]
    """Warnings for the user."""


@dataclass(frozen=True, eq=False)
class EditJob:
    """The edit that the jobs of one request share."""

    edit: Edit
    """The picture, and which part of it to draw."""

    feather: int
    """Width of the transition, in pixels (see `compose`)."""


@dataclass(eq=False)
class Job:
    """One picture to draw."""

    subject: Subject
    """What it shows."""

    seed: int
    """Seed of its noise."""

    settings: dict[str, Any]
    """Resolved sampling settings."""

    settings_key: Hashable
    """Equal for settings that may share a batch."""

    on_level: OnLevel | None = None
    """Called with the picture after each step, if the request streams levels."""

    edit: EditJob | None = None
    """The edit it belongs to, None for a new picture."""

    future: Future[JobResult] = field(default_factory=Future)
    """Its result, or what went wrong."""

    arrived: float = 0.0
    """When it was queued, by the batcher's clock, in seconds."""

    cancelled: bool = False
    """Whether nobody waits for it any longer."""

    last_step: int = -1
    """The last step that `on_level` was called for."""

    @property
    def batch_key(self) -> tuple[Hashable, bool, EditJob | None]:
        """Equal for jobs that may share a batch: the same settings, with or without levels, of the same edit."""
        return self.settings_key, self.on_level is not None, self.edit

    def cancel(self) -> None:
        """Free the job's place in the queue; its batch is given up when all of its jobs are cancelled."""
        self.cancelled = True
        self.future.cancel()
