"""The course of a load test, on a server within the test."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

import run
from clients import GENERATE, Outcome
from far_runtime.errors import FarError
from run import FIRST_WARM_UP_REQUEST, Plan, Result
from serve_process import ServerStats

MODEL = {"condition": "labels", "count": 10}


def png(grey: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (grey, grey, grey)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


@dataclass
class FakeServer:
    """Answers in place of a server, and remembers the requests."""

    grey_alone: int = 100
    """What a picture that is requested alone looks like; others are 100."""

    status: int = 200
    """Of the responses to requests for pictures."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of the requests for pictures."""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"far": MODEL}]})
        if request.url.path == "/metrics":
            return httpx.Response(200, text=f"process_resident_memory_bytes {len(self.bodies)}.0\n")
        assert request.url.path == GENERATE
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.status != 200:
            return httpx.Response(self.status, json={"error": {"code": "x"}})
        file = png(self.grey_alone if body["n"] == 1 else 100)
        images = [{"seed": body["seed"] + i, "b64_json": file} for i in range(body["n"])]
        return httpx.Response(200, json={"data": images})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """A fake server at any address."""
    fake = FakeServer()

    def connect(address: str, key: str = "") -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(fake), base_url=address)

    monkeypatch.setattr(run, "connect", connect)
    return fake


def run_plan(**settings: Any) -> Result:
    values = {"seed": 0, "streams": 0.0, "most_pictures": 4, "clients": 1, "warm_up": 0.01, **settings}
    return asyncio.run(Plan(**values).run("http://127.0.0.1:1"))


def test_a_test_warms_up_loads_and_draws_again(server: FakeServer) -> None:
    result = run_plan(requests=6, check=3)
    count = len(server.bodies)
    warm_up = int(result.warm.memory)
    assert (result.before.memory, result.broken) == (0, ())
    assert warm_up > 0
    assert len(result.outcomes) == 6
    assert result.after is not None and result.after.memory == warm_up + 6 == count - 3
    assert result.memory and warm_up <= result.memory[0] <= warm_up + 6
    assert result.differences == [0, 0, 0]
    workload = run.Workload(0, MODEL, 0.0, 4)
    assert server.bodies[0] == workload.request(FIRST_WARM_UP_REQUEST)[1]
    assert server.bodies[warm_up : warm_up + 6] == [workload.request(i)[1] for i in range(6)]
    assert server.bodies[-3:] == [{**workload.request(i)[1], "n": 1} for i in range(3)]


def test_the_difference_of_pictures_drawn_again_is_told(server: FakeServer) -> None:
    server.grey_alone = 97
    workload = run.Workload(0, MODEL, 0.0, 4)
    expected = [0 if workload.request(i)[1]["n"] == 1 else 3 for i in range(20)]
    assert {0, 3} == set(expected)
    assert run_plan(requests=20, check=20).differences == expected


def test_an_open_loop_takes_the_place_of_the_closed_one(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    async def open_loop(self: Any, rate: float) -> None:
        rates.append(rate)

    monkeypatch.setattr(run.Load, "open_loop", open_loop)
    assert run_plan(rate=50.0).outcomes == []
    assert rates == [50.0]


@pytest.mark.parametrize("status", [429, 500])
def test_a_warm_up_may_be_rejected_but_not_fail(server: FakeServer, status: int) -> None:
    server.status = status
    if status == 500:
        with pytest.raises(FarError, match="the warm-up failed: 500 x; try a request by hand"):
            run_plan(requests=2)
    else:
        assert [outcome.error for outcome in run_plan(requests=2).outcomes] == ["429 x"] * 2


def test_an_interrupt_ends_a_test_early_with_a_result(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    send = run.Load.send

    async def interrupting(self: Any, due: float) -> float:
        if len(self.outcomes) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.001)  # lets the signal be handled
        return await send(self, due)

    monkeypatch.setattr(run.Load, "send", interrupting)
    result = run_plan(seconds=10, warm_up=0.0)
    assert 3 < len(result.outcomes) < 100
    assert result.after is not None and result.seconds < 5


STATS = ServerStats(memory=1e8, files=10.0, cpu=1.0, pictures=0.0, refused={}, batches={})


def result_of(*broken: str) -> Result:
    return Result([Outcome(pictures=1)], 2.0, STATS, STATS, STATS, [1e8], [], broken)


def compare(monkeypatch: pytest.MonkeyPatch, rounds: int, *results: Result | None) -> tuple[Any, list[Any]]:
    """A comparison with these results in turn, None for a test that cannot begin; also what was tested."""
    remaining, tested = list(results), list[Any]()

    async def fake_run(plan: Plan, address: str, key: str = "") -> Result:
        tested.append((address, key, plan.seconds, plan.check))
        if (result := remaining.pop(0)) is None:
            raise FarError("gone")
        return result

    monkeypatch.setattr(Plan, "run", fake_run)
    return asyncio.run(Plan(0, 0, 1).compare("a", "b", rounds, "key")), tested


def test_two_servers_are_tested_in_turn_for_an_equal_time(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [result_of() for _ in range(4)]
    pairs, tested = compare(monkeypatch, 2, *results)
    assert pairs == [(results[0], results[1]), (results[2], results[3])]
    assert tested == [("a", "key", 15.0, 0), ("b", "key", 15.0, 0)] * 2


def test_a_comparison_ends_after_a_round_in_which_something_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(compare(monkeypatch, 3, result_of(), result_of("broke"))[0]) == 1


def test_a_later_round_that_cannot_begin_leaves_the_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    (pair,), _ = compare(monkeypatch, 3, result_of(), result_of(), None)
    assert (pair[0].broken, pair[1].broken) == ((), ("round 2: gone",))
    with pytest.raises(FarError, match="gone"):
        compare(monkeypatch, 3, None)
