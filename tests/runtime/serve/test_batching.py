"""The queue: what is drawn together, what is refused, and what becomes of pictures that nobody waits for."""

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
from far_runtime.serve.auth import Rate
from far_runtime.serve.batching import Batcher, Closed, Failed, Job, QueueFull

WAIT = 30.0


class Gated:
    """A pipeline that draws its pictures' seeds, two steps each, and only when it is let: `let` counts calls."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.let = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.poison = -1
        self.closed = False

    def generate(
        self, subjects: Sequence[Subject], seeds: Sequence[int], *, batch_size: int, on_progress: Any, on_level: Any,
        **settings: Any,
    ) -> Generation:  # fmt: skip
        assert batch_size == len(subjects) == len(seeds)
        self.batches.append(list(seeds))
        self.begun.release()
        assert self.let.acquire(timeout=WAIT)
        images = np.stack([np.full((2, 2, 3), seed, np.uint8) for seed in seeds])
        for step in range(2):
            on_progress(None)
            if on_level:
                on_level(step, images // (2 - step))
        if self.poison in seeds:
            raise FarError("poisoned")
        made = [
            PictureMetadata("b", 0, "", seed, dict(settings), "e", "1", None, len(seeds), i, "1")
            for i, seed in enumerate(seeds)
        ]
        return Generation(images, np.zeros((len(seeds), 1)), tuple(made))

    def close(self) -> None:
        self.closed = True


class Told:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.sizes: list[int] = []

    def queued(self, count: int) -> None:
        self.lengths.append(count)

    def batch(self, size: int, waits: Sequence[float], stages: Mapping[str, Sequence[float]]) -> None:
        assert len(waits) == size
        self.sizes.append(size)


@pytest.fixture
def gated() -> Gated:
    return Gated()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def batcher(gated: Gated, told: Told) -> Iterator[Batcher]:
    made = Batcher(gated, max_batch=3, max_wait=0.0, max_queue=4, watcher=told)  # type: ignore[arg-type]
    yield made
    gated.let.release(100)
    made.close()


def ticket(seed: int, on_level: Any = None, **settings: Any) -> Job:
    return Job(Subject(0), seed, {"guidance": 1.0, **settings}, str(settings), on_level)


def begin(batcher: Batcher, gated: Gated, seed: int = 0) -> Job:
    """A ticket whose batch, of itself alone, is being drawn."""
    first = ticket(seed)
    batcher.submit([first])
    assert gated.begun.acquire(timeout=WAIT)
    return first


def test_what_waits_together_is_drawn_together_where_the_settings_agree(
    batcher: Batcher, gated: Gated, told: Told
) -> None:
    first = begin(batcher, gated)
    others = [ticket(1, steps=3), ticket(2), ticket(3, steps=3)]
    batcher.submit(others)
    gated.let.release(3)
    assert [one.future.result(WAIT).pixels[0, 0, 0] for one in (first, *others)] == [0, 1, 2, 3]
    assert gated.batches == [[0], [1, 3], [2]]
    assert others[2].future.result().settings.sampling["steps"] == 3
    assert told.sizes == [1, 2, 1]
    assert (max(told.lengths), told.lengths[-1]) == (3, 0)


def test_pictures_of_other_guidance_share_a_batch(batcher: Batcher, gated: Gated) -> None:
    begin(batcher, gated)
    others = [Job(Subject(0), seed, {"guidance": 1.0 + seed, "steps": 2}, "same") for seed in (1, 2)]
    batcher.submit(others)
    gated.let.release(2)
    drawn = [one.future.result(WAIT) for one in others]
    assert gated.batches == [[0], [1, 2]]
    assert drawn[0].settings.sampling == {"guidance": [2.0, 3.0], "steps": 2}


def test_no_batch_is_larger_than_the_engine_takes(batcher: Batcher, gated: Gated) -> None:
    begin(batcher, gated)
    batcher.submit([ticket(seed) for seed in (1, 2, 3, 4)])
    gated.let.release(3)
    batcher.close()
    assert gated.batches == [[0], [1, 2, 3], [4]]


def test_the_first_waits_for_company_but_not_beyond_a_full_batch(gated: Gated) -> None:
    batcher = Batcher(gated, max_batch=2, max_wait=WAIT)  # type: ignore[arg-type]
    gated.let.release(2)
    batcher.submit([ticket(1)])
    assert not gated.begun.acquire(timeout=0.2)
    batcher.submit([ticket(2)])
    assert gated.begun.acquire(timeout=WAIT / 2)
    assert gated.batches == [[1, 2]]
    batcher.close()
    assert gated.closed


def test_a_full_queue_refuses_all_of_a_request_and_says_when_to_come_again(batcher: Batcher, gated: Gated) -> None:
    begin(batcher, gated)
    batcher.submit([ticket(seed) for seed in (1, 2, 3)])
    refused = [ticket(4), ticket(5)]
    with pytest.raises(QueueFull) as told:
        batcher.submit(refused)
    assert told.value.wait >= 1
    batcher.submit([ticket(6)])  # one has room
    gated.let.release(10)
    batcher.close()
    assert sorted(seed for batch in gated.batches for seed in batch) == [0, 1, 2, 3, 6]


def test_who_leaves_frees_the_place(batcher: Batcher, gated: Gated, told: Told) -> None:
    begin(batcher, gated)
    waiting = [ticket(seed) for seed in (1, 2, 3, 4)]
    batcher.submit(waiting)
    for one in waiting:
        one.leave()
    batcher.submit([ticket(5)])
    gated.let.release(10)
    batcher.close()
    assert gated.batches == [[0], [5]]
    assert told.lengths[-1] == 0


def test_a_batch_that_nobody_waits_for_is_given_up(batcher: Batcher, gated: Gated) -> None:
    first = begin(batcher, gated)
    first.leave()
    gated.let.release()
    with pytest.raises(CancelledError):
        first.future.result(WAIT)
    one = begin(batcher, gated, 1)  # and the next is drawn
    gated.let.release()
    assert one.future.result(WAIT).pixels.max() == 1


def test_a_picture_that_fails_takes_no_other_with_it(batcher: Batcher, gated: Gated) -> None:
    begin(batcher, gated)
    gated.poison = 2
    tickets = [ticket(seed) for seed in (1, 2, 3)]
    batcher.submit(tickets)
    gated.let.release(10)
    assert tickets[0].future.result(WAIT).pixels.max() == 1
    assert tickets[2].future.result(WAIT).pixels.max() == 3
    with pytest.raises(Failed, match="its log says why"):
        tickets[1].future.result(WAIT)
    assert batcher.alive


def test_levels_that_were_seen_before_a_batch_failed_are_not_sent_twice(batcher: Batcher, gated: Gated) -> None:
    begin(batcher, gated)
    gated.poison = 4
    seen: list[tuple[int, int]] = []
    tickets = [ticket(seed, lambda step, pixels, seed=seed: seen.append((seed, step))) for seed in (4, 6)]
    batcher.submit(tickets)
    gated.let.release(10)
    assert tickets[1].future.result(WAIT).pixels.max() == 6
    with pytest.raises(Failed):
        tickets[0].future.result(WAIT)
    assert gated.batches == [[0], [4, 6], [4], [6]]
    assert seen == [(4, 0), (6, 0), (4, 1), (6, 1)]


def test_levels_come_to_those_who_asked(batcher: Batcher, gated: Gated) -> None:
    begin(batcher, gated)
    seen: list[tuple[int, int, int]] = []
    tickets = [
        ticket(seed, lambda step, pixels, seed=seed: seen.append((seed, step, int(pixels.max())))) for seed in (4, 6)
    ]
    batcher.submit([*tickets, ticket(1)])
    gated.let.release(10)
    for one in tickets:
        one.future.result(WAIT)
    assert seen == [(4, 0, 2), (6, 0, 3), (4, 1, 4), (6, 1, 6)]
    assert [4, 6] in gated.batches


def test_closing_draws_what_waits_and_takes_no_more(batcher: Batcher, gated: Gated) -> None:
    first = begin(batcher, gated)
    waiting = ticket(1)
    batcher.submit([waiting])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher.alive:
        pass
    with pytest.raises(Closed):
        batcher.submit([ticket(2)])
    gated.let.release(2)
    closing.join(WAIT)
    assert first.future.done()
    assert waiting.future.result(0).pixels.max() == 1
    assert gated.closed


def test_what_is_not_drawn_in_the_time_of_grace_is_refused(batcher: Batcher, gated: Gated) -> None:
    first = begin(batcher, gated)
    waiting = ticket(1)
    batcher.submit([waiting])
    threading.Timer(0.5, gated.let.release).start()
    batcher.close(timeout=0.1)
    assert first.future.result(WAIT).pixels.max() == 0
    with pytest.raises(Closed):
        waiting.future.result(WAIT)


def test_a_rate_fills_evenly_and_takes_back_what_was_not_used() -> None:
    now = [0.0]
    rate = Rate(6, lambda: now[0])
    assert rate.take("a", 6) == 0
    assert rate.take("a", 1) == pytest.approx(10)
    assert rate.take("b", 6) == 0  # each has a bucket of its own
    rate.give("a", 2)
    assert rate.take("a", 2) == 0
    now[0] = 1000.0
    assert rate.take("a", 6) == 0  # a minute's worth is the most
    assert rate.take("a", 1) > 0
