"""Clients that ask a server for pictures, closed loop or open, and put down what came of every request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

GENERATE, STREAM = "/v1/images/generations", "/v1/generate/stream"
MOST_OPEN = 2000
"""Requests of the open loop that may be under way; what would come beyond is put down as not sent."""
GONE = 1.0
"""Seconds before a client asks again where nobody listened, which is told at once."""
STRANGE = (ValueError, LookupError, TypeError)
"""What comes of reading an answer that is not what it should be."""
REFUSED = "429"
"""What the error of a refused request begins with."""


@dataclass(frozen=True)
class Workload:
    """What is asked. seed: of everything that is drawn by lot. about: the model, as /v1/models tells of it. streams:
    the share of streams. most: pictures of a request, 1 to this. fields: further ones of every request. prompts: for a
    model that reads text."""

    seed: int
    about: Mapping[str, Any]
    streams: float
    most: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ("a red apple", "a smiling face")

    def request(self, number: int) -> tuple[str, dict[str, Any]]:
        """Route and body of the request of this number, the same at every run."""
        lot = random.Random(f"{self.seed}/{number}")
        route = STREAM if lot.random() < self.streams else GENERATE
        count = lot.randint(1, self.most)
        text = self.about["condition"] == "text"
        what = {"prompt": lot.choice(self.prompts)} if text else {"label": lot.randrange(self.about["count"])}
        return route, {**what, "n": count, "seed": lot.randrange(2**32), **self.fields}


@dataclass(frozen=True)
class Outcome:
    """A request that is over. seconds: from when it was due (closed loop: sent) to the end of its answer. first: to the
    first level, in a stream. pictures: those that came. error: what went wrong, "" for nothing."""

    stream: bool
    seconds: float
    first: float | None
    pictures: int
    error: str


@dataclass
class Load:
    """A run: its workload against a server. keep: the first picture of how many requests is kept (`kept`: bodies with
    the PNG in base64)."""

    client: httpx.AsyncClient
    workload: Workload
    keep: int = 0
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    outcomes: list[Outcome] = field(default_factory=list)
    kept: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    ends: float = float("inf")
    most: int | None = None
    begun: int = 0

    def over(self) -> bool:
        """Whether no further request is to be sent."""
        return time.perf_counter() >= self.ends or (self.most is not None and self.begun >= self.most)

    def stop(self) -> None:
        """Send no further request."""
        self.ends = 0.0

    async def closed(self, clients: int) -> None:
        """So many clients, each of which asks again when it has its answer, or has waited as long as it was told to."""

        async def one() -> None:
            while not self.over():
                wait = await self.ask(time.perf_counter())
                if wait:
                    await asyncio.sleep(min(wait, max(0.0, self.ends - time.perf_counter())))

        await asyncio.gather(*(one() for _ in range(clients)))

    async def open(self, rate: float) -> None:
        """Requests that come by lot (Poisson), so many a second, however long the answers take. Seconds count from when
        a request was due: a late client is no excuse."""
        lot, due = random.Random(f"{self.workload.seed}/arrivals"), time.perf_counter()
        under_way: set[asyncio.Task[float]] = set()
        while True:
            due += lot.expovariate(rate)
            await asyncio.sleep(max(0.0, min(due, self.ends) - time.perf_counter()))
            if self.over():
                break
            if len(under_way) >= MOST_OPEN:
                self.begun += 1
                self.outcomes.append(Outcome(False, 0.0, None, 0, "not sent: too many were under way"))
                continue
            task = asyncio.ensure_future(self.ask(due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    async def ask(self, due: float) -> float:
        """One request; the seconds to wait before another, where the server said so or was not there."""
        self.begun += 1
        route, body = self.workload.request(next(self.numbers))
        first: list[float] = []
        error, pictures, wait = "", 0, 0.0
        try:
            answered = self._stream if route == STREAM else self._plain
            pictures = await answered(body, lambda: first.append(time.perf_counter() - due))
        except Refused as refused:
            error, wait = refused.what, refused.wait
        except httpx.HTTPError as failed:
            error = type(failed).__name__
            wait = GONE if isinstance(failed, httpx.ConnectError) else 0.0
        except STRANGE as strange:
            error = f"an answer that is none: {type(strange).__name__}"
        seconds = time.perf_counter() - due
        self.outcomes.append(Outcome(route == STREAM, seconds, first[0] if first else None, pictures, error))
        return wait

    async def _plain(self, body: dict[str, Any], on_level: Callable[[], None]) -> int:
        answer = await self.client.post(GENERATE, json=body)
        if answer.status_code != 200:
            raise Refused.of(answer)
        data = answer.json()["data"]
        self._take(body, [(one["seed"], one["b64_json"]) for one in data])
        return len(data)

    async def _stream(self, body: dict[str, Any], on_level: Callable[[], None]) -> int:
        pictures: list[tuple[int, str]] = []
        last = ""
        async with self.client.stream("POST", STREAM, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise Refused.of(answer)
            async for event in httpx.EventSource(answer, max_event_size=None):
                last = event.event
                if last == "level":
                    on_level()
                elif last == "picture":
                    found = json.loads(event.data)
                    pictures.append((found["seed"], found["b64_json"]))
                elif last == "error":
                    raise Refused(f"in a stream: {json.loads(event.data)['error']['code']}")
        if last != "done":
            raise Refused("a stream that broke off")
        self._take(body, pictures)
        return len(pictures)

    def _take(self, body: dict[str, Any], pictures: list[tuple[int, str]]) -> None:
        """ValueError unless these are the pictures that were asked for."""
        if [seed for seed, _ in pictures] != [body["seed"] + i for i in range(body["n"])]:
            raise ValueError("other pictures")
        if len(self.kept) < self.keep:
            self.kept.append((body, pictures[0][1]))


class Refused(Exception):
    """An answer that is an error. what: status and code. wait: seconds, where the server said so."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.what, self.wait = what, wait

    @classmethod
    def of(cls, answer: httpx.Response) -> Refused:
        """From an answer of another status than 200."""
        wait = answer.headers.get("retry-after", "")
        return cls(f"{answer.status_code} {answer.json()['error']['code']}", float(wait) if wait.isdigit() else 0.0)


async def every(seconds: float, act: Callable[[], Awaitable[None]]) -> None:
    """Do something again and again, until it is cancelled; a server that does not answer meanwhile, or
    with something else, is passed over."""
    while True:
        with contextlib.suppress(httpx.HTTPError, *STRANGE):
            await act()
        await asyncio.sleep(seconds)
