"""Runs of a load test: warm-up, load, memory on the way, and the same pictures afterwards."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import numpy as np
from PIL import Image

from far_runtime.errors import FarError
from load_clients import GENERATE, Load, Outcome, Workload, every
from serve_process import Seen

WAIT = 180.0
"""Seconds that a request may take, which is beyond the server's own deadline."""
FIRST_WARM = 1 << 40
"""Number of the first request of a warm-up, which the run itself never reaches."""


@dataclass(frozen=True)
class Result:
    """A run. seconds: until the last answer. before, warm, after: the server when it was ready, after the warm-up, and
    at the end. memory: its resident bytes, every second. differences: of pictures drawn again alone, in 255ths."""

    outcomes: list[Outcome]
    seconds: float
    before: Seen
    warm: Seen
    after: Seen
    memory: list[float]
    differences: list[int]


@dataclass(frozen=True)
class Plan:
    """What to run. seed, streams, most_pictures, fields: see `Workload`. clients: of a closed loop. rate: requests a
    second of an open one in its place. requests: the most that are sent. check: pictures to draw again.
    warm_up: seconds before."""

    seed: int
    streams: float
    most_pictures: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    clients: int = 8
    rate: float | None = None
    seconds: float = 60.0
    requests: int | None = None
    check: int = 8
    warm_up: float = 5.0

    async def run(self, address: str) -> Result:
        """Load a server."""
        async with connected(address) as client:
            workload = await self._workload(client)
            before = await seen(client)
            await self._warm_up(client, workload)
            warm, memory = await seen(client), list[float]()

            async def look() -> None:
                memory.append((await seen(client)).memory)

            load = Load(client, workload, self.check)
            looking = asyncio.ensure_future(every(1.0, look))
            started = time.perf_counter()
            await self._load(load, started + self.seconds)
            seconds = time.perf_counter() - started
            looking.cancel()
            after = await seen(client)
            differences = [await difference(client, body, file) for body, file in load.kept]
        return Result(load.outcomes, seconds, before, warm, after, memory, differences)

    async def compared(self, together: str, alone: str, rounds: int) -> list[tuple[Result, Result]]:
        """Load two servers in turn with the same requests, each `rounds` times for an equal part of the seconds."""
        part = Plan(
            self.seed, self.streams, self.most_pictures, self.fields, self.clients, self.rate,
            self.seconds / (2 * rounds), self.requests, 0, self.warm_up,
        )  # fmt: skip
        return [(await part.run(together), await part.run(alone)) for _ in range(rounds)]

    async def _workload(self, client: httpx.AsyncClient) -> Workload:
        try:
            answer = await client.get("/v1/models")
            about = answer.raise_for_status().json()["data"][0]["far"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise FarError(f"{client.base_url}: no far serve answers there ({type(error).__name__})") from error
        return Workload(self.seed, about, self.streams, self.most_pictures, self.fields)

    async def _warm_up(self, client: httpx.AsyncClient, workload: Workload) -> None:
        """So that all batch sizes have run once, and the memory of what is kept is there."""
        load = Load(client, workload, numbers=itertools.count(FIRST_WARM))
        load.ends = time.perf_counter() + self.warm_up
        await load.closed(self.clients)
        if bad := [one.error for one in load.outcomes if one.error and not one.error.startswith("429")]:
            raise FarError(f"the warm-up failed: {bad[0]}; try a request by hand")

    async def _load(self, load: Load, ends: float) -> None:
        load.ends, load.most = ends, self.requests
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # on Windows
            loop.add_signal_handler(signal.SIGINT, load.stop)
        try:
            await (load.closed(self.clients) if self.rate is None else load.open(self.rate))
        finally:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(signal.SIGINT)


def connected(address: str) -> httpx.AsyncClient:
    """A client with as many connections as it takes."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=address, timeout=WAIT, limits=limits, trust_env=False)


async def seen(client: httpx.AsyncClient) -> Seen:
    """The server at this moment."""
    return Seen.read((await client.get("/metrics")).text)


async def difference(client: httpx.AsyncClient, body: Mapping[str, Any], file: str) -> int:
    """Between the first picture of a request and the same one alone: the largest, in 255ths."""
    answer = await client.post(GENERATE, json={**body, "n": 1})
    again = answer.raise_for_status().json()["data"][0]["b64_json"]
    return int(np.abs(pixels(file) - pixels(again)).max())


def pixels(file: str) -> Any:
    """Of a picture in base64, as numbers that can be subtracted."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB")).astype(np.int16)
