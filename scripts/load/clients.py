"""Clients that send requests to a server, in a closed or an open loop, and record the outcome of each."""

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
MAX_IN_FLIGHT = 2000
"""Unanswered requests of the open loop; further ones are recorded as not sent."""
RECONNECT_SECONDS = 1.0
"""Before a client tries again after a connection was refused, which happens at once."""
MALFORMED = (ValueError, LookupError, TypeError)
"""What reading a malformed response raises."""
REJECTED = "429"
"""What the error of a rejected request begins with."""


@dataclass(frozen=True)
class Workload:
    """The requests of a load test, which depend on the seed alone."""

    seed: int
    """Seed of everything random."""

    model: Mapping[str, Any]
    """The model, as /v1/models describes it."""

    stream_share: float
    """The share of requests that are streams, 0 to 1."""

    max_pictures: int
    """Pictures of the largest request; others have 1 to so many."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request."""

    prompts: tuple[str, ...] = ("a red apple", "a smiling face")
    """What to ask of a model that reads text."""

    def request(self, number: int) -> tuple[str, dict[str, Any]]:
        """Route and body of the request of this number."""
        rng = random.Random(f"{self.seed}/{number}")
        route = STREAM if rng.random() < self.stream_share else GENERATE
        count = rng.randint(1, self.max_pictures)
        if self.model["condition"] == "text":
            subject: dict[str, Any] = {"prompt": rng.choice(self.prompts)}
        else:
            subject = {"label": rng.randrange(self.model["count"])}
        return route, {**subject, "n": count, "seed": rng.randrange(2**32), **self.fields}


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    stream: bool = False
    """Whether it was a stream."""

    seconds: float = 0.0
    """From when it was due (in a closed loop: sent) to the end of its response."""

    first_level: float | None = None
    """Seconds to the first level of a stream."""

    pictures: int = 0
    """Pictures that were received."""

    error: str = ""
    """What went wrong; "" for nothing."""


@dataclass
class Load:
    """A running load test: requests sent to a server, and their outcomes."""

    client: httpx.AsyncClient
    """The connections to the server."""

    workload: Workload
    """What is requested."""

    keep: int = 0
    """For how many requests the first picture is kept."""

    numbers: itertools.count[int] = field(default_factory=itertools.count)
    """Numbers of the requests to come."""

    outcomes: list[Outcome] = field(default_factory=list)
    """Of the requests that are over."""

    kept: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    """Bodies of requests, each with its first picture as a PNG in base64."""

    ends: float = float("inf")
    """When to send no more, on the clock time.perf_counter."""

    max_requests: int | None = None
    """How many requests to send, None for no limit."""

    sent: int = 0
    """How many requests were sent, those among them that the open loop could not send."""

    def over(self) -> bool:
        """Whether to send no more requests."""
        return time.perf_counter() >= self.ends or (self.max_requests is not None and self.sent >= self.max_requests)

    def stop(self) -> None:
        """Send no more requests."""
        self.ends = 0.0

    async def closed_loop(self, clients: int) -> None:
        """Clients that each send a request when the one before is answered, and when a Retry-After has passed."""

        async def run_client() -> None:
            while not self.over():
                wait = await self.send(time.perf_counter())
                if wait:
                    await asyncio.sleep(min(wait, max(0.0, self.ends - time.perf_counter())))

        await asyncio.gather(*(run_client() for _ in range(clients)))

    async def open_loop(self, rate: float) -> None:
        """Requests at random times (a Poisson process), `rate` a second, however long the responses take.

        Their seconds count from when they were due, so that a delay of this loop counts too.
        """
        rng, due = random.Random(f"{self.workload.seed}/arrivals"), time.perf_counter()
        in_flight: set[asyncio.Task[float]] = set()
        while True:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, min(due, self.ends) - time.perf_counter()))
            if self.over():
                break
            if len(in_flight) >= MAX_IN_FLIGHT:
                self.sent += 1
                self.outcomes.append(Outcome(error="not sent: too many requests are in flight"))
                continue
            task = asyncio.ensure_future(self.send(due))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)
        await asyncio.gather(*in_flight)

    async def send(self, due: float) -> float:
        """Send a request and record its outcome.

        Returns the seconds to wait before another request, if the server asks for that or is not there.
        """
        self.sent += 1
        route, body = self.workload.request(next(self.numbers))
        first_level: list[float] = []
        error, pictures, wait = "", 0, 0.0
        try:
            receive = self._receive_stream if route == STREAM else self._receive
            pictures = await receive(body, lambda: first_level.append(time.perf_counter() - due))
        except RequestFailed as failure:
            error, wait = str(failure), failure.retry_after
        except httpx.HTTPError as failure:
            error = type(failure).__name__
            wait = RECONNECT_SECONDS if isinstance(failure, httpx.ConnectError) else 0.0
        except MALFORMED as failure:
            error = f"a malformed response: {type(failure).__name__}"
        outcome = Outcome(
            stream=route == STREAM,
            seconds=time.perf_counter() - due,
            first_level=first_level[0] if first_level else None,
            pictures=pictures,
            error=error,
        )
        self.outcomes.append(outcome)
        return wait

    async def _receive(self, body: dict[str, Any], on_level: Callable[[], None]) -> int:
        response = await self.client.post(GENERATE, json=body)
        if response.status_code != 200:
            raise RequestFailed.from_response(response)
        pictures = [(image["seed"], image["b64_json"]) for image in response.json()["data"]]
        self._keep(body, pictures)
        return len(pictures)

    async def _receive_stream(self, body: dict[str, Any], on_level: Callable[[], None]) -> int:
        pictures: list[tuple[int, str]] = []
        name = ""
        async with self.client.stream("POST", STREAM, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise RequestFailed.from_response(response)
            async for event in httpx.EventSource(response, max_event_size=None):
                name = event.event
                if name == "level":
                    on_level()
                elif name == "picture":
                    image = json.loads(event.data)
                    pictures.append((image["seed"], image["b64_json"]))
                elif name == "error":
                    raise RequestFailed(f"in a stream: {json.loads(event.data)['error']['code']}")
        if name != "done":
            raise RequestFailed("a stream that broke off")
        self._keep(body, pictures)
        return len(pictures)

    def _keep(self, body: dict[str, Any], pictures: list[tuple[int, str]]) -> None:
        """Keep the first picture of a request; raises ValueError unless these are the pictures that it asked for."""
        if [seed for seed, _ in pictures] != [body["seed"] + i for i in range(body["n"])]:
            raise ValueError("other pictures than those of the request")
        if len(self.kept) < self.keep:
            self.kept.append((body, pictures[0][1]))


class RequestFailed(Exception):
    """A request that was answered with an error."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds, if the server asks for them."""

    @classmethod
    def from_response(cls, response: httpx.Response) -> RequestFailed:
        """From a response of another status than 200."""
        seconds = response.headers.get("retry-after", "")
        message = f"{response.status_code} {response.json()['error']['code']}"
        return cls(message, float(seconds) if seconds.isdigit() else 0.0)


async def repeat(seconds: float, action: Callable[[], Awaitable[None]]) -> None:
    """Call `action` every so many seconds until this is cancelled, whether or not the server answers it."""
    while True:
        with contextlib.suppress(httpx.HTTPError, *MALFORMED):
            await action()
        await asyncio.sleep(seconds)
