"""The course of a load test: warm-up, load, memory meanwhile, and some of the pictures once more afterwards."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2 as httpx
import numpy as np
from PIL import Image

from clients import GENERATE, MALFORMED, REJECTED, Load, Outcome, RequestFailed, Workload, repeat
from far_runtime.cli.option_names import with_options
from far_runtime.errors import FarError
from serve_process import ServerStats

TIMEOUT = 180.0
"""Seconds that a request may take; more than the server's own deadline."""
FIRST_WARM_UP_REQUEST = 1 << 40
"""Number of the first request of a warm-up, which the test itself never reaches."""


@dataclass(frozen=True)
class Result:
    """The result of a load test."""

    outcomes: list[Outcome]
    """Of all requests."""

    seconds: float
    """Until the last response."""

    before: ServerStats
    """The server when it was ready."""

    warm: ServerStats
    """The server after the warm-up."""

    after: ServerStats | None
    """The server at the end; None if it did not answer."""

    memory: list[float]
    """Resident bytes of the server, every second."""

    differences: list[int]
    """For each picture that was drawn again alone, its largest difference, of 255."""

    broken: tuple[str, ...] = ()
    """What failed beside the requests of the load."""


@dataclass(frozen=True)
class Plan:
    """A load test."""

    seed: int
    """Seed of the workload."""

    streams: float
    """The share of requests that are streams, 0 to 1."""

    most_pictures: int
    """Pictures of the largest request."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request."""

    clients: int = 8
    """Clients of the closed loop, and of the warm-up."""

    rate: float | None = None
    """Requests a second of an open loop, which takes the place of the closed loop."""

    seconds: float = 60.0
    """How long requests are sent."""

    requests: int | None = None
    """How many requests are sent at most."""

    check: int = 8
    """How many pictures are drawn again."""

    warm_up: float = 5.0
    """Seconds of the warm-up."""

    async def run(self, address: str, key: str = "") -> Result:
        """Test a server; key: an API key, if it needs one. Raises FarError if the test cannot begin."""
        async with connect(address, key) as client:
            workload = await self._workload(client)
            before = await _first_stats(client)
            await self._warm_up(client, workload)
            warm, memory = await _first_stats(client), list[float]()

            async def record_memory() -> None:
                memory.append((await read_stats(client)).memory)

            load = Load(client, workload, self.check)
            recorder = asyncio.ensure_future(repeat(1.0, record_memory))
            started = time.perf_counter()
            await self._load(load, started + self.seconds)
            seconds = time.perf_counter() - started
            recorder.cancel()
            after, broken = None, list[str]()
            try:
                after = await read_stats(client)
            except (httpx.HTTPError, *MALFORMED) as error:
                broken.append(f"the server's /metrics cannot be read at the end: {type(error).__name__}")
            differences, failures = await _draw_again(client, load)
        return Result(
            outcomes=load.outcomes,
            seconds=seconds,
            before=before,
            warm=warm,
            after=after,
            memory=memory,
            differences=differences,
            broken=(*broken, *failures),
        )

    async def compare(self, batched: str, unbatched: str, rounds: int, key: str = "") -> list[tuple[Result, Result]]:
        """Test two servers in turn with the same requests, for an equal part of the seconds in each round.

        It ends after a round in which something broke. If a later round cannot begin, the round before says so.
        """
        part = replace(self, seconds=self.seconds / (2 * rounds), check=0)
        results: list[tuple[Result, Result]] = []
        while len(results) < rounds and not any(result.broken for pair in results for result in pair):
            try:
                results.append((await part.run(batched, key), await part.run(unbatched, key)))
            except FarError as error:
                if not results:
                    raise
                first, second = results[-1]
                broken = (*second.broken, f"round {len(results) + 1}: {with_options(error)}")
                results[-1] = first, replace(second, broken=broken)
        return results

    async def _workload(self, client: httpx.AsyncClient) -> Workload:
        try:
            response = await client.get("/v1/models")
            if response.status_code == 401:
                raise FarError(f"{client.base_url}: the server needs an API key; give it as FAR_KEY or by --key")
            model = response.raise_for_status().json()["data"][0]["far"]
        except (httpx.HTTPError, *MALFORMED) as error:
            raise FarError(f"{client.base_url}: no far serve answers there ({type(error).__name__})") from error
        return Workload(self.seed, model, self.streams, self.most_pictures, self.fields)

    async def _warm_up(self, client: httpx.AsyncClient, workload: Workload) -> None:
        """Let the server draw batches of all sizes once, and allocate the memory of what it keeps."""
        load = Load(client, workload, numbers=itertools.count(FIRST_WARM_UP_REQUEST))
        load.ends = time.perf_counter() + self.warm_up
        await load.closed_loop(self.clients)
        errors = [outcome.error for outcome in load.outcomes if outcome.error]
        if failures := [error for error in errors if not error.startswith(REJECTED)]:
            raise FarError(f"the warm-up failed: {failures[0]}; try a request by hand")

    async def _load(self, load: Load, ends: float) -> None:
        load.ends, load.max_requests = ends, self.requests
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # on Windows
            loop.add_signal_handler(signal.SIGINT, load.stop)
        try:
            await (load.closed_loop(self.clients) if self.rate is None else load.open_loop(self.rate))
        finally:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(signal.SIGINT)


async def _first_stats(client: httpx.AsyncClient) -> ServerStats:
    """The server's statistics before the load; raises FarError if they cannot be read."""
    try:
        return await read_stats(client)
    except (httpx.HTTPError, *MALFORMED) as error:
        raise FarError(
            f"{client.base_url}: /metrics cannot be read ({type(error).__name__}); see that far serve runs there"
        ) from error


async def _draw_again(client: httpx.AsyncClient, load: Load) -> tuple[list[int], list[str]]:
    """Draw the kept pictures once more, each alone; returns their differences and what failed.

    It ends when the server does not answer at all.
    """
    differences, failures = list[int](), list[str]()
    for body, file in load.kept:
        try:
            differences.append(await difference(client, body, file))
        except httpx.TransportError as error:
            failures.append(f"pictures were not drawn again: {type(error).__name__}")
            break
        except RequestFailed as error:
            failures.append(f"a picture was not drawn again: {error}")
        except (httpx.HTTPError, OSError, *MALFORMED) as error:  # OSError: the file is not a picture
            failures.append(f"a picture was not drawn again: {type(error).__name__}")
    return differences, failures


def connect(address: str, key: str = "") -> httpx.AsyncClient:
    """A client with as many connections as it needs; key: an API key, "" for none."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=address, headers=headers, timeout=TIMEOUT, limits=limits, trust_env=False)


async def read_stats(client: httpx.AsyncClient) -> ServerStats:
    """The server's statistics now; raises an error of httpx, or one of MALFORMED, if they cannot be read."""
    return ServerStats.parse((await client.get("/metrics")).raise_for_status().text)


async def difference(client: httpx.AsyncClient, body: Mapping[str, Any], file: str) -> int:
    """The largest difference, of 255, between the first picture of a request and the same picture drawn alone.

    Raises RequestFailed if the server answers with an error.
    """
    response = await client.post(GENERATE, json={**body, "n": 1})
    if response.status_code != 200:
        raise RequestFailed.from_response(response)
    return int(np.abs(decode(file) - decode(response.json()["data"][0]["b64_json"])).max())


def decode(file: str) -> Any:
    """The pixels of a picture in base64, as signed numbers."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB")).astype(np.int16)
