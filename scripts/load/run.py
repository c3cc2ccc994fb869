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
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2 as httpx
import numpy as np
from PIL import Image

from clients import GENERATE, STRANGE, Load, Outcome, Refused, Workload, every
from far_runtime.errors import FarError
from serve_process import Seen

WAIT = 180.0
"""Seconds that a request may take, which is beyond the server's own deadline."""
FIRST_WARM = 1 << 40
"""Number of the first request of a warm-up, which the run itself never reaches."""


@dataclass(frozen=True)
class Result:
    """A run. seconds: until the last answer. before, warm, after: the server when it was ready, after the warm-up, and
    at the end (None: it did not answer). memory: its resident bytes, every second. differences: of pictures drawn again
    alone, in 255ths. broken: what failed beside the requests of the load."""

    outcomes: list[Outcome]
    seconds: float
    before: Seen
    warm: Seen
    after: Seen | None
    memory: list[float]
    differences: list[int]
    broken: tuple[str, ...] = ()


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

    async def run(self, address: str, key: str = "") -> Result:
        """Load a server; key: one of its keys, where it has any. FarError where it cannot be begun."""
        async with connected(address, key) as client:
            workload = await self._workload(client)
            before = await self._seen(client)
            await self._warm_up(client, workload)
            warm, memory = await self._seen(client), list[float]()

            async def look() -> None:
                memory.append((await seen(client)).memory)

            load = Load(client, workload, self.check)
            looking = asyncio.ensure_future(every(1.0, look))
            started = time.perf_counter()
            await self._load(load, started + self.seconds)
            seconds = time.perf_counter() - started
            looking.cancel()
            after, broken = None, list[str]()
            try:
                after = await seen(client)
            except (httpx.HTTPError, *STRANGE) as error:
                broken.append(f"the server does not tell its numbers at the end: {type(error).__name__}")
            differences, more = await self._drawn_again(client, load)
        return Result(load.outcomes, seconds, before, warm, after, memory, differences, (*broken, *more))

    async def compared(self, together: str, alone: str, rounds: int, key: str = "") -> list[tuple[Result, Result]]:
        """Load two servers in turn with the same requests, each `rounds` times for an equal part of the seconds. It
        ends after a round in which something broke; a later round that cannot be begun is put down in the last one."""
        part = Plan(
            self.seed, self.streams, self.most_pictures, self.fields, self.clients, self.rate,
            self.seconds / (2 * rounds), self.requests, 0, self.warm_up,
        )  # fmt: skip
        turns: list[tuple[Result, Result]] = []
        while len(turns) < rounds and not any(one.broken for turn in turns for one in turn):
            try:
                turns.append((await part.run(together, key), await part.run(alone, key)))
            except FarError as error:
                if not turns:
                    raise
                one, other = turns[-1]
                turns[-1] = one, replace(other, broken=(*other.broken, f"round {len(turns) + 1}: {error}"))
        return turns

    async def _workload(self, client: httpx.AsyncClient) -> Workload:
        try:
            answer = await client.get("/v1/models")
            if answer.status_code == 401:
                raise FarError(f"{client.base_url}: that server wants one of its keys; give it as FAR_KEY or by --key")
            about = answer.raise_for_status().json()["data"][0]["far"]
        except (httpx.HTTPError, *STRANGE) as error:
            raise FarError(f"{client.base_url}: no far serve answers there ({type(error).__name__})") from error
        return Workload(self.seed, about, self.streams, self.most_pictures, self.fields)

    async def _seen(self, client: httpx.AsyncClient) -> Seen:
        try:
            return await seen(client)
        except (httpx.HTTPError, *STRANGE) as error:
            raise FarError(
                f"{client.base_url}: /metrics does not tell the server's numbers ({type(error).__name__}); "
                "see that far serve runs there"
            ) from error

    async def _drawn_again(self, client: httpx.AsyncClient, load: Load) -> tuple[list[int], list[str]]:
        """Differences of what was kept, and what failed; a server that does not answer at all is not asked again."""
        differences, broken = list[int](), list[str]()
        for body, file in load.kept:
            failed = ""
            try:
                differences.append(await difference(client, body, file))
            except Refused as refused:
                failed = refused.what
            except (httpx.HTTPError, OSError, *STRANGE) as error:  # OSError: no picture
                failed = type(error).__name__
                if isinstance(error, httpx.TransportError):
                    broken.append(f"pictures were not drawn again: {failed}")
                    break
            if failed:
                broken.append(f"a picture was not drawn again: {failed}")
        return differences, broken

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


def connected(address: str, key: str = "") -> httpx.AsyncClient:
    """A client with as many connections as it takes; key: "" for none."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=address, headers=headers, timeout=WAIT, limits=limits, trust_env=False)


async def seen(client: httpx.AsyncClient) -> Seen:
    """The server at this moment; an error of httpx, or one of STRANGE, where it does not tell."""
    return Seen.read((await client.get("/metrics")).raise_for_status().text)


async def difference(client: httpx.AsyncClient, body: Mapping[str, Any], file: str) -> int:
    """Between the first picture of a request and the same one alone: the largest, in 255ths. Refused for an answer that
    is an error."""
    answer = await client.post(GENERATE, json={**body, "n": 1})
    if answer.status_code != 200:
        raise Refused.of(answer)
    again = answer.json()["data"][0]["b64_json"]
    return int(np.abs(pixels(file) - pixels(again)).max())


def pixels(file: str) -> Any:
    """Of a picture in base64, as numbers that can be subtracted."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB")).astype(np.int16)
