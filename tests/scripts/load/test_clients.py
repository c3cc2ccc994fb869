"""Clients of the load test: the same seed sends the same requests, and every outcome is recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2 as httpx
import pytest

import clients
from clients import GENERATE, RECONNECT_SECONDS, STREAM, Load, Workload

MODEL = {"condition": "labels", "count": 10}
ERROR = {"error": {"code": "x"}}


def load_of(handler: Callable[[httpx.Request], Any], stream_share: float = 0.0, **settings: Any) -> Load:
    """A load on a server that answers in this way."""
    client = httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://127.0.0.1")
    return Load(client, Workload(0, MODEL, stream_share, 1), **settings)


def event_stream(text: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


def disconnect(request: httpx.Request) -> httpx.Response:
    raise httpx.RemoteProtocolError("incomplete")


def test_the_same_seed_makes_the_same_requests() -> None:
    first, second, other = (Workload(seed, MODEL, 0.25, 4, {"steps": 1}) for seed in (0, 0, 1))
    requests = [first.request(i) for i in range(400)]
    assert requests == [second.request(i) for i in range(400)]
    assert requests != [other.request(i) for i in range(400)]
    assert 70 < [route for route, _ in requests].count(STREAM) < 130
    assert {route for route, _ in requests} == {GENERATE, STREAM}
    assert {body["n"] for _, body in requests} == {1, 2, 3, 4}
    assert {body["label"] for _, body in requests} == set(range(10))
    assert {body["steps"] for _, body in requests} == {1}
    assert len({body["seed"] for _, body in requests}) == 400
    text = Workload(0, {"condition": "text", "count": None}, 0, 1, {}, ("a cat",))
    assert text.request(0)[1]["prompt"] == "a cat"


@pytest.mark.parametrize(
    ("handler", "stream_share", "error"),
    [
        (lambda request: httpx.Response(429, json={"error": {"code": "queue_full"}}), 0.0, "429 queue_full"),
        (lambda request: httpx.Response(500, json={"error": {"code": "internal_error"}}), 1.0, "500 internal_error"),
        (lambda request: httpx.Response(502, text="<html>"), 0.0, "a malformed response: JSONDecodeError"),
        (lambda request: httpx.Response(200, json={"data": []}), 0.0, "a malformed response: ValueError"),
        (disconnect, 0.0, "RemoteProtocolError"),
        (event_stream('event: error\ndata: {"error": {"code": "deadline"}}\n\n'), 1.0, "in a stream: deadline"),
        (event_stream("event: level\ndata: {}\n\n"), 1.0, "a stream that broke off"),
        (event_stream("event: done\ndata: {}\n\n"), 1.0, "a malformed response: ValueError"),
    ],
)
def test_errors_are_recorded_by_kind(handler: Any, stream_share: float, error: str) -> None:
    load = load_of(handler, stream_share, max_requests=1)
    asyncio.run(load.closed_loop(1))
    assert [outcome.error for outcome in load.outcomes] == [error]
    assert [outcome.pictures for outcome in load.outcomes] == [0]


def test_every_client_of_a_closed_loop_waits_for_its_response() -> None:
    in_flight, largest = 0, 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight, largest
        in_flight += 1
        largest = max(largest, in_flight)
        await asyncio.sleep(0.01)
        in_flight -= 1
        return httpx.Response(500, json=ERROR)

    load = load_of(handler, max_requests=30)
    asyncio.run(load.closed_loop(3))
    assert largest == 3
    assert 30 <= len(load.outcomes) <= 32
    assert min(outcome.seconds for outcome in load.outcomes) >= 0.01


def test_a_closed_loop_waits_as_long_as_the_server_asks() -> None:
    load = load_of(lambda request: httpx.Response(429, json=ERROR, headers={"retry-after": "30"}))
    load.ends = time.perf_counter() + 0.2
    asyncio.run(load.closed_loop(1))
    assert load.sent == 1


def test_a_refused_connection_is_tried_again_later() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    assert asyncio.run(load_of(refuse).send(0.0)) == RECONNECT_SECONDS
    assert asyncio.run(load_of(disconnect).send(0.0)) == 0.0


def test_seconds_of_an_open_loop_count_from_when_a_request_was_due() -> None:
    """A loop that is blocked for a fifth of a second sends late; the responses come at once."""
    blocked = [True]

    def handler(request: httpx.Request) -> httpx.Response:
        if blocked[0]:
            blocked[0] = False
            time.sleep(0.2)  # the whole loop
        return httpx.Response(500, json=ERROR)

    load = load_of(handler, max_requests=40)
    asyncio.run(load.open_loop(400))
    assert len(load.outcomes) == 40
    assert len([outcome for outcome in load.outcomes if outcome.seconds > 0.1]) > 10


def test_an_open_loop_sends_no_more_than_may_be_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_IN_FLIGHT", 2)

    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.5)
        return httpx.Response(500, json=ERROR)

    load = load_of(handler, max_requests=10)
    asyncio.run(load.open_loop(1000))
    errors = [outcome.error for outcome in load.outcomes]
    assert errors.count("500 x") == 2
    assert errors.count("not sent: too many requests are in flight") == 8


def test_the_first_level_of_a_stream_is_timed() -> None:
    async def events() -> AsyncIterator[bytes]:
        yield b"event: level\ndata: {}\n\n"
        await asyncio.sleep(0.2)
        yield b"event: level\ndata: {}\n\n"
        yield b'event: picture\ndata: {"seed": 5, "b64_json": "PNG"}\n\nevent: done\ndata: {}\n\n'

    load = load_of(
        lambda request: httpx.Response(200, content=events(), headers={"content-type": "text/event-stream"}), 1.0
    )
    load.workload = Workload(0, MODEL, 1.0, 1, {"seed": 5})
    load.keep = 1
    asyncio.run(load.send(time.perf_counter()))
    (outcome,) = load.outcomes
    assert (outcome.stream, outcome.pictures, outcome.error) == (True, 1, "")
    assert outcome.first_level is not None and outcome.first_level < 0.15 < outcome.seconds
    assert [file for _, file in load.kept] == ["PNG"]


def test_as_many_pictures_are_kept_as_are_asked_for() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"data": [{"seed": 5, "b64_json": "PNG"}]})

    load = load_of(handler, keep=3, max_requests=5)
    load.workload = Workload(0, MODEL, 0.0, 1, {"seed": 5})
    asyncio.run(load.closed_loop(1))
    assert (len(load.kept), sum(outcome.pictures for outcome in load.outcomes)) == (3, 5)
