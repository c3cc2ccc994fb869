"""Pictures that wait together are drawn together: a bounded queue, and the one thread that owns the engine."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from far_runtime.conditioning.subjects import Subject
from far_runtime.errors import FarError, NotFinite
from far_runtime.generation import Generation, OnProgress, Progress
from far_runtime.images.edit import Edit, compose
from far_runtime.images.metadata import PictureMetadata
from far_runtime.pipeline import Pipeline

LOG = logging.getLogger("far_runtime.serve")
Pixels = NDArray[np.uint8]


class QueueFull(FarError):
    """No room; wait: seconds after which there should be some."""

    def __init__(self, waiting: int, wait: float) -> None:
        super().__init__(f"{waiting} pictures are waiting, which is all that may; try again in {wait:.0f} s")
        self.wait = wait


class Closed(FarError):
    """The server is on its way out."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; try again in a moment, or at another one")


class Failed(FarError):
    """A picture that could not be drawn; why is for the server's log alone."""

    def __init__(self, message: str = "the server failed at this request; its log says why") -> None:
        super().__init__(message)


class OutOfRange(Failed):
    """A picture whose latents are not finite."""

    def __init__(self) -> None:
        super().__init__("the picture's numbers ran out of range; try less guidance, or another preset")


class Abandoned(Exception):
    """Nobody waits for any picture of the batch any longer."""


@dataclass(frozen=True)
class JobResult:
    """A picture uint8 [H, W, 3] with its settings; seconds it waited, its batch took, and each stage of that took;
    warnings for the user."""

    pixels: Pixels
    settings: PictureMetadata
    waited: float
    seconds: float
    stages: Mapping[str, float]
    warnings: tuple[str, ...]


OnLevel = Callable[[int, Pixels], None]
"""Called, on the drawing thread, with a step's number and the picture [H, W, 3] after it."""


@dataclass(frozen=True, eq=False)
class EditJob:
    """What the pictures of a request are drawn into: an edit, and the pixels of its transition (`compose`)."""

    edit: Edit
    feather: int


@dataclass(eq=False)
class Job:
    """A picture that is asked for. settings: resolved ones. kind: what the pictures of one batch have in common.
    edited:
    what it is drawn into. shown: the last step that `on_level` was told of. Who loses interest calls `leave`."""

    subject: Subject
    seed: int
    settings: dict[str, Any]
    kind: Hashable
    on_level: OnLevel | None = None
    edited: EditJob | None = None
    future: Future[JobResult] = field(default_factory=Future)
    arrived: float = 0.0
    left: bool = False
    shown: int = -1

    @property
    def key(self) -> tuple[Hashable, bool, EditJob | None]:
        """What is drawn with what: the kind, whether levels are shown, and an edit's pictures with one another."""
        return self.kind, self.on_level is not None, self.edited

    def leave(self) -> None:
        """Give the place in the queue free, or the batch up if nobody else waits for it."""
        self.left = True
        self.future.cancel()


class Watcher(Protocol):
    """Who is told of the queue's doings; metrics."""

    def queued(self, count: int) -> None:
        """So many pictures wait now."""

    def batch(self, size: int, waits: Sequence[float], stages: Mapping[str, Sequence[float]]) -> None:
        """A batch was drawn: seconds that each of its pictures waited, and that every call of a stage took."""


class Batcher:
    """Draws tickets with a pipeline, which no one else may use meanwhile.

    largest: pictures of a batch. patience: seconds for which the first of a batch waits for company. room: pictures
    that may wait. seconds: by stage, every call since they were last taken (of a `TimedEngine`).
    """

    def __init__(
        self,
        pipeline: Pipeline,
        max_batch: int = 8,
        max_wait: float = 0.01,
        max_queue: int = 64,
        seconds: dict[str, list[float]] | None = None,
        watcher: Watcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pipeline = pipeline
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self._seconds = {} if seconds is None else seconds
        self._watcher = watcher
        self._clock = clock
        self._pace = 1.0  # seconds of a picture, to say how long a full queue takes
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="far-serve", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether pictures are taken and drawn."""
        return self._thread.is_alive() and not self._closed

    def submit(self, tickets: Sequence[Job]) -> None:
        """Queue tickets, all of them or none. QueueFull where they have no room, Closed after `close`."""
        with self._changed:
            self._check_room(len(tickets))
            for ticket in tickets:
                ticket.arrived = self._clock()
                self._waiting.append(ticket)
            self._tell()
            self._changed.notify()

    def check_room(self, count: int) -> None:
        """QueueFull or Closed where so many tickets could not be queued now."""
        with self._changed:
            self._check_room(count)

    def _check_room(self, count: int) -> None:
        if not self.alive:
            raise Closed
        self._drop_left()
        if len(self._waiting) + count > self.max_queue:
            raise QueueFull(len(self._waiting), max(1.0, len(self._waiting) * self._pace))

    def close(self, timeout: float | None = None) -> None:
        """Take no more tickets, draw those that wait, and give the engine back. What is not drawn within `timeout`
        seconds is refused with Closed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                while self._waiting:
                    _fail(self._waiting.popleft(), Closed())
            self._thread.join()
        self.pipeline.close()

    def _work(self) -> None:
        while batch := self._next():
            self._draw(batch)

    def _next(self) -> list[Job]:
        """The tickets of the next batch, when it is full or the first has waited long enough; none after the last."""
        with self._changed:
            while True:
                self._drop_left()
                if not self._waiting and self._closed:
                    return []
                if not self._waiting:
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                batch = [ticket for ticket in self._waiting if ticket.key == first.key][: self.max_batch]
                left = first.arrived + self.max_wait - self._clock()
                if len(batch) < self.max_batch and left > 0 and not self._closed:
                    self._changed.wait(left)
                    continue
                taken = [ticket for ticket in batch if ticket.future.set_running_or_notify_cancel()]
                for ticket in batch:
                    self._waiting.remove(ticket)
                self._tell()
                if taken:
                    return taken

    def _draw(self, batch: Sequence[Job]) -> None:
        """Draw a batch and tell everyone, also of failures."""
        started = self._clock()
        self._seconds.clear()

        def on_progress(progress: Progress) -> None:
            if all(ticket.left for ticket in batch):
                raise Abandoned

        def on_level(step: int, images: Pixels) -> None:
            for ticket, image in zip(batch, images, strict=True):
                if ticket.on_level and not ticket.left and step > ticket.shown:  # which it was before a batch failed
                    ticket.on_level(step, image)
                    ticket.shown = step

        try:
            made = self._made(batch, on_progress, on_level if batch[0].on_level else None)
        except Abandoned:
            for ticket in batch:
                _fail(ticket, CancelledError())
            return
        except Exception as error:  # also MemoryError: the thread has to go on
            if len(batch) > 1:
                for ticket in batch:  # the fault may be of one picture
                    self._draw([ticket])
                return
            LOG.error("the picture of seed %d was not drawn", batch[0].seed, exc_info=error)
            _fail(batch[0], OutOfRange() if isinstance(error, NotFinite) else Failed())
            return
        took = self._clock() - started
        self._pace = took / len(batch)
        stages = {name: sum(calls) for name, calls in self._seconds.items()}
        if self._watcher:
            self._watcher.batch(len(batch), [started - ticket.arrived for ticket in batch], self._seconds)
        for i, ticket in enumerate(batch):
            waited = started - ticket.arrived
            drawn = JobResult(made.images[i], made.settings[i], waited, took, stages, made.warnings)
            ticket.future.set_result(drawn)

    def _made(
        self,
        batch: Sequence[Job],
        on_progress: OnProgress,
        on_level: Callable[[int, Pixels], None] | None,
    ) -> Generation:
        """A batch's pictures, drawn."""
        subjects, seeds = [ticket.subject for ticket in batch], [ticket.seed for ticket in batch]
        settings = {**batch[0].settings, "guidance": [ticket.settings["guidance"] for ticket in batch]}
        into = batch[0].edited
        if into is None:
            return self.pipeline.generate(
                subjects, seeds, batch_size=len(batch), on_progress=on_progress, on_level=on_level, **settings
            )
        edit, source = into.edit, {**into.edit.source, "feather": str(into.feather)}

        def shown(step: int, images: Pixels) -> None:
            if on_level:
                on_level(step, compose(images, edit, into.feather))

        made = self.pipeline.edit(
            subjects, seeds, edit.image, edit.keep, edited=source, batch_size=len(batch), on_progress=on_progress,
            on_level=shown if on_level else None, **settings,
        )  # fmt: skip
        notes = (*edit.notes, *made.warnings)
        return replace(made, images=compose(made.images, edit, into.feather), warnings=notes)

    def _drop_left(self) -> None:
        before = len(self._waiting)
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.left)
        if len(self._waiting) != before:
            self._tell()

    def _tell(self) -> None:
        if self._watcher:
            self._watcher.queued(len(self._waiting))


def _fail(ticket: Job, error: BaseException) -> None:
    if ticket.future.running() or ticket.future.set_running_or_notify_cancel():
        ticket.future.set_exception(error)
