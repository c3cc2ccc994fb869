"""The queue: which jobs share a batch, which are refused, and what becomes of jobs that nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

from far_runtime.conditioning.subjects import Subject
from far_runtime.errors import FarError
from far_runtime.generation import Generation
from far_runtime.images.metadata import PictureMetadata
from far_runtime.serve.auth import RateLimiter
from far_runtime.serve.batching import Batcher, QueueConfig
from far_runtime.serve.exceptions import GenerationFailed, QueueFull, ShuttingDown
from far_runtime.serve.jobs import Job

TIMEOUT = 30.0


class GatedPipeline:
    """A pipeline that draws its pictures' seeds in two steps, each batch when `gate` is released."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Semaphore(0)
        self.started = threading.Semaphore(0)
        self.bad_seed = -1
        self.closed = False

    def generate(
        self, subjects: Sequence[Subject], seeds: Sequence[int], *, batch_size: int, on_progress: Any, on_level: Any,
        **settings: Any,
    ) -> Generation:  # fmt: skip
        assert batch_size == len(subjects) == len(seeds)
        self.batches.append(list(seeds))
        self.started.release()
        assert self.gate.acquire(timeout=TIMEOUT)
        images = np.stack([np.full((2, 2, 3), seed, np.uint8) for seed in seeds])
        for step in range(2):
            on_progress(None)
            if on_level:
                on_level(step, images // (2 - step))
        if self.bad_seed in seeds:
            raise FarError("a bad seed")
        metadata = [
            PictureMetadata("b", 0, "", seed, dict(settings), "e", "1", None, len(seeds), i, "1")
            for i, seed in enumerate(seeds)
        ]
        return Generation(images, np.zeros((len(seeds), 1)), tuple(metadata))

    def close(self) -> None:
        self.closed = True


class RecordingObserver:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.sizes: list[int] = []

    def queue_changed(self, length: int) -> None:
        self.lengths.append(length)

    def batch_drawn(self, size: int, waits: Sequence[float], stages: Mapping[str, Sequence[float]]) -> None:
        assert len(waits) == size
        self.sizes.append(size)


@pytest.fixture
def pipeline() -> GatedPipeline:
    return GatedPipeline()


@pytest.fixture
def observer() -> RecordingObserver:
    return RecordingObserver()


@pytest.fixture
def batcher(pipeline: GatedPipeline, observer: RecordingObserver) -> Iterator[Batcher]:
    config = QueueConfig(max_batch=3, max_wait=0.0, max_queue=4)
    batcher = Batcher(pipeline, config, observer=observer)  # type: ignore[arg-type]
    yield batcher
    pipeline.gate.release(100)
    batcher.close()


def job_of(seed: int, on_level: Any = None, **settings: Any) -> Job:
    return Job(Subject(0), seed, {"guidance": 1.0, **settings}, str(settings), on_level)


def start(batcher: Batcher, pipeline: GatedPipeline, seed: int = 0) -> Job:
    """A job whose batch, of itself alone, is being drawn."""
    job = job_of(seed)
    batcher.submit([job])
    assert pipeline.started.acquire(timeout=TIMEOUT)
    return job


def test_jobs_that_wait_share_a_batch_if_their_settings_agree(
    batcher: Batcher, pipeline: GatedPipeline, observer: RecordingObserver
) -> None:
    first = start(batcher, pipeline)
    others = [job_of(1, steps=3), job_of(2), job_of(3, steps=3)]
    batcher.submit(others)
    pipeline.gate.release(3)
    assert [job.future.result(TIMEOUT).pixels[0, 0, 0] for job in (first, *others)] == [0, 1, 2, 3]
    assert pipeline.batches == [[0], [1, 3], [2]]
    assert others[2].future.result().settings.sampling["steps"] == 3
    assert observer.sizes == [1, 2, 1]
    assert (max(observer.lengths), observer.lengths[-1]) == (3, 0)


def test_jobs_with_different_guidance_share_a_batch(batcher: Batcher, pipeline: GatedPipeline) -> None:
    start(batcher, pipeline)
    jobs = [Job(Subject(0), seed, {"guidance": 1.0 + seed, "steps": 2}, "same") for seed in (1, 2)]
    batcher.submit(jobs)
    pipeline.gate.release(2)
    results = [job.future.result(TIMEOUT) for job in jobs]
    assert pipeline.batches == [[0], [1, 2]]
    assert results[0].settings.sampling == {"guidance": [2.0, 3.0], "steps": 2}


def test_no_batch_is_larger_than_the_engine_takes(batcher: Batcher, pipeline: GatedPipeline) -> None:
    start(batcher, pipeline)
    batcher.submit([job_of(seed) for seed in (1, 2, 3, 4)])
    pipeline.gate.release(3)
    batcher.close()
    assert pipeline.batches == [[0], [1, 2, 3], [4]]


def test_the_first_job_waits_for_others_until_the_batch_is_full(pipeline: GatedPipeline) -> None:
    batcher = Batcher(pipeline, QueueConfig(max_batch=2, max_wait=TIMEOUT))  # type: ignore[arg-type]
    pipeline.gate.release(2)
    batcher.submit([job_of(1)])
    assert not pipeline.started.acquire(timeout=0.2)
    batcher.submit([job_of(2)])
    assert pipeline.started.acquire(timeout=TIMEOUT / 2)
    assert pipeline.batches == [[1, 2]]
    batcher.close()
    assert pipeline.closed


def test_a_full_queue_refuses_all_jobs_of_a_request_and_says_when_to_try_again(
    batcher: Batcher, pipeline: GatedPipeline
) -> None:
    start(batcher, pipeline)
    batcher.submit([job_of(seed) for seed in (1, 2, 3)])
    with pytest.raises(QueueFull) as caught:
        batcher.submit([job_of(4), job_of(5)])
    assert caught.value.retry_after >= 1
    batcher.submit([job_of(6)])  # there is room for one
    pipeline.gate.release(10)
    batcher.close()
    assert sorted(seed for batch in pipeline.batches for seed in batch) == [0, 1, 2, 3, 6]


def test_cancelled_jobs_free_their_places(
    batcher: Batcher, pipeline: GatedPipeline, observer: RecordingObserver
) -> None:
    start(batcher, pipeline)
    jobs = [job_of(seed) for seed in (1, 2, 3, 4)]
    batcher.submit(jobs)
    for job in jobs:
        job.cancel()
    batcher.submit([job_of(5)])
    pipeline.gate.release(10)
    batcher.close()
    assert pipeline.batches == [[0], [5]]
    assert observer.lengths[-1] == 0


def test_a_batch_of_cancelled_jobs_is_given_up(batcher: Batcher, pipeline: GatedPipeline) -> None:
    first = start(batcher, pipeline)
    first.cancel()
    pipeline.gate.release()
    with pytest.raises(CancelledError):
        first.future.result(TIMEOUT)
    second = start(batcher, pipeline, 1)
    pipeline.gate.release()
    assert second.future.result(TIMEOUT).pixels.max() == 1


def test_a_job_that_fails_takes_no_other_with_it(batcher: Batcher, pipeline: GatedPipeline) -> None:
    start(batcher, pipeline)
    pipeline.bad_seed = 2
    jobs = [job_of(seed) for seed in (1, 2, 3)]
    batcher.submit(jobs)
    pipeline.gate.release(10)
    assert jobs[0].future.result(TIMEOUT).pixels.max() == 1
    assert jobs[2].future.result(TIMEOUT).pixels.max() == 3
    with pytest.raises(GenerationFailed, match="its log says why"):
        jobs[1].future.result(TIMEOUT)
    assert batcher.alive


def test_levels_that_were_sent_before_a_batch_failed_are_not_sent_twice(
    batcher: Batcher, pipeline: GatedPipeline
) -> None:
    start(batcher, pipeline)
    pipeline.bad_seed = 4
    levels: list[tuple[int, int]] = []
    jobs = [job_of(seed, lambda step, pixels, seed=seed: levels.append((seed, step))) for seed in (4, 6)]
    batcher.submit(jobs)
    pipeline.gate.release(10)
    assert jobs[1].future.result(TIMEOUT).pixels.max() == 6
    with pytest.raises(GenerationFailed):
        jobs[0].future.result(TIMEOUT)
    assert pipeline.batches == [[0], [4, 6], [4], [6]]
    assert levels == [(4, 0), (6, 0), (4, 1), (6, 1)]


def test_levels_are_sent_to_the_jobs_that_ask_for_them(batcher: Batcher, pipeline: GatedPipeline) -> None:
    start(batcher, pipeline)
    levels: list[tuple[int, int, int]] = []
    jobs = [
        job_of(seed, lambda step, pixels, seed=seed: levels.append((seed, step, int(pixels.max())))) for seed in (4, 6)
    ]
    batcher.submit([*jobs, job_of(1)])
    pipeline.gate.release(10)
    for job in jobs:
        job.future.result(TIMEOUT)
    assert levels == [(4, 0, 2), (6, 0, 3), (4, 1, 4), (6, 1, 6)]
    assert [4, 6] in pipeline.batches


def test_closing_draws_the_jobs_that_wait_and_accepts_no_more(batcher: Batcher, pipeline: GatedPipeline) -> None:
    first = start(batcher, pipeline)
    waiting = job_of(1)
    batcher.submit([waiting])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher.alive:
        pass
    with pytest.raises(ShuttingDown):
        batcher.submit([job_of(2)])
    pipeline.gate.release(2)
    closing.join(TIMEOUT)
    assert first.future.done()
    assert waiting.future.result(0).pixels.max() == 1
    assert pipeline.closed


def test_jobs_that_are_not_begun_within_the_grace_fail(batcher: Batcher, pipeline: GatedPipeline) -> None:
    first = start(batcher, pipeline)
    waiting = job_of(1)
    batcher.submit([waiting])
    threading.Timer(0.5, pipeline.gate.release).start()
    batcher.close(timeout=0.1)
    assert first.future.result(TIMEOUT).pixels.max() == 0
    with pytest.raises(ShuttingDown):
        waiting.future.result(TIMEOUT)


def test_a_rate_limiter_fills_evenly_and_takes_refunds() -> None:
    now = [0.0]
    limiter = RateLimiter(6, lambda: now[0])
    assert limiter.acquire("a", 6) == 0
    assert limiter.acquire("a", 1) == pytest.approx(10)
    assert limiter.acquire("b", 6) == 0  # each client has its own bucket
    limiter.refund("a", 2)
    assert limiter.acquire("a", 2) == 0
    now[0] = 1000.0
    assert limiter.acquire("a", 6) == 0  # no more than a minute's worth
    assert limiter.acquire("a", 1) > 0
