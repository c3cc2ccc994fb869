"""A bounded queue of jobs, and the one thread that owns the pipeline and runs them in batches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import Protocol

from far_runtime.errors import NotFinite
from far_runtime.generation import Generation, OnProgress, Progress
from far_runtime.images.edit import compose
from far_runtime.pipeline import Pipeline
from far_runtime.serve.exceptions import GenerationFailed, OutOfRange, QueueFull, ShuttingDown
from far_runtime.serve.jobs import Job, JobResult, Pixels

LOG = logging.getLogger("far_runtime.serve")


class BatchCancelled(Exception):
    """All jobs of a batch were cancelled."""


@dataclass(frozen=True)
class QueueConfig:
    """How jobs wait for their batch."""

    max_batch: int = 8
    """Pictures of a batch."""

    max_wait: float = 0.01
    """How long the first job of a batch waits for others to fill it, in seconds."""

    max_queue: int = 64
    """Jobs that may wait."""


class BatcherObserver(Protocol):
    """What a batcher reports to, such as metrics."""

    def queue_changed(self, length: int) -> None:
        """So many jobs wait now."""

    def batch_drawn(self, size: int, waits: Sequence[float], stages: Mapping[str, Sequence[float]]) -> None:
        """A batch was drawn: seconds that each of its jobs waited, and seconds of every call of each stage."""


class Batcher:
    """Runs jobs in batches on a pipeline, which nothing else may use meanwhile."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: QueueConfig,
        stage_seconds: dict[str, list[float]] | None = None,
        observer: BatcherObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread.

        stage_seconds: where the pipeline's `TimedEngine` records the seconds of every call, by stage.
        """
        self.pipeline = pipeline
        self.config = config
        self._stage_seconds = {} if stage_seconds is None else stage_seconds
        self._observer = observer
        self._clock = clock
        self._seconds_per_picture = 1.0  # of the last batch; says how long a full queue takes
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="far-serve", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are accepted and drawn."""
        return self._thread.is_alive() and not self._closed

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs or none; raises QueueFull if there is no room for them, ShuttingDown after `close`."""
        with self._changed:
            self._check_capacity(len(jobs))
            for job in jobs:
                job.arrived = self._clock()
                self._queue.append(job)
            self._report_length()
            self._changed.notify()

    def check_capacity(self, count: int) -> None:
        """Raise what `submit` would raise now for so many jobs."""
        with self._changed:
            self._check_capacity(count)

    def _check_capacity(self, count: int) -> None:
        if not self.alive:
            raise ShuttingDown
        self._drop_cancelled()
        waiting = len(self._queue)
        if waiting + count > self.config.max_queue:
            raise QueueFull(waiting, max(1.0, waiting * self._seconds_per_picture))

    def close(self, timeout: float | None = None) -> None:
        """Accept no more jobs, draw those that wait, and close the pipeline.

        Jobs that are not begun within `timeout` seconds fail with ShuttingDown.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                while self._queue:
                    _fail(self._queue.popleft(), ShuttingDown())
            self._thread.join()
        self.pipeline.close()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._draw(batch)

    def _next_batch(self) -> list[Job]:
        """The jobs of the next batch, once it is full or its first job has waited long enough; [] at the end."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if not self._queue and self._closed:
                    return []
                if not self._queue:
                    self._changed.wait()
                    continue
                first = self._queue[0]
                batch = [job for job in self._queue if job.batch_key == first.batch_key][: self.config.max_batch]
                remaining = first.arrived + self.config.max_wait - self._clock()
                if len(batch) < self.config.max_batch and remaining > 0 and not self._closed:
                    self._changed.wait(remaining)
                    continue
                running = [job for job in batch if job.future.set_running_or_notify_cancel()]
                for job in batch:
                    self._queue.remove(job)
                self._report_length()
                if running:
                    return running

    def _draw(self, batch: Sequence[Job]) -> None:
        """Draw a batch and set the result, or the error, of each of its jobs."""
        started = self._clock()
        self._stage_seconds.clear()

        def on_progress(progress: Progress) -> None:
            if all(job.cancelled for job in batch):
                raise BatchCancelled

        def on_level(step: int, images: Pixels) -> None:
            for job, image in zip(batch, images, strict=True):
                # A job that is drawn again because its batch failed has had its first steps already.
                if job.on_level and not job.cancelled and step > job.last_step:
                    job.on_level(step, image)
                    job.last_step = step

        try:
            generation = self._generate(batch, on_progress, on_level if batch[0].on_level else None)
        except BatchCancelled:
            for job in batch:
                _fail(job, CancelledError())
            return
        except Exception as error:  # MemoryError included: the thread has to go on
            if len(batch) > 1:
                # The fault may lie in one picture, which must not take the others with it.
                for job in batch:
                    self._draw([job])
                return
            LOG.error("the picture of seed %d was not drawn", batch[0].seed, exc_info=error)
            _fail(batch[0], OutOfRange() if isinstance(error, NotFinite) else GenerationFailed())
            return
        seconds = self._clock() - started
        self._seconds_per_picture = seconds / len(batch)
        if self._observer:
            self._observer.batch_drawn(len(batch), [started - job.arrived for job in batch], self._stage_seconds)
        stages = {name: sum(calls) for name, calls in self._stage_seconds.items()}
        for i, job in enumerate(batch):
            result = JobResult(
                pixels=generation.images[i],
                settings=generation.settings[i],
                waited=started - job.arrived,
                seconds=seconds,
                stages=stages,
                warnings=generation.warnings,
            )
            job.future.set_result(result)

    def _generate(
        self, batch: Sequence[Job], on_progress: OnProgress, on_level: Callable[[int, Pixels], None] | None
    ) -> Generation:
        """The pictures of a batch; on_level is called with all of them, [B, H, W, 3], after each step."""
        subjects, seeds = [job.subject for job in batch], [job.seed for job in batch]
        settings = {**batch[0].settings, "guidance": [job.settings["guidance"] for job in batch]}
        edit_job = batch[0].edit
        if edit_job is None:
            return self.pipeline.generate(
                subjects, seeds, batch_size=len(batch), on_progress=on_progress, on_level=on_level, **settings
            )
        edit, feather = edit_job.edit, edit_job.feather

        def on_edited_level(step: int, images: Pixels) -> None:
            if on_level:
                on_level(step, compose(images, edit, feather))

        generation = self.pipeline.edit(
            subjects, seeds, edit.image, edit.keep, edited={**edit.source, "feather": str(feather)},
            batch_size=len(batch), on_progress=on_progress, on_level=on_edited_level if on_level else None, **settings,
        )  # fmt: skip
        warnings = (*edit.notes, *generation.warnings)
        return replace(generation, images=compose(generation.images, edit, feather), warnings=warnings)

    def _drop_cancelled(self) -> None:
        before = len(self._queue)
        self._queue = deque(job for job in self._queue if not job.cancelled)
        if len(self._queue) != before:
            self._report_length()

    def _report_length(self) -> None:
        if self._observer:
            self._observer.queue_changed(len(self._queue))


def _fail(job: Job, error: BaseException) -> None:
    if job.future.running() or job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)
