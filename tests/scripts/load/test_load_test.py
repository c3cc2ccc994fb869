"""The load test: the same seed asks the same, what goes wrong is put down by kind, and the report says so."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx2 as httpx
import pytest
from click.testing import CliRunner
from PIL import Image

from clients import GENERATE, STREAM, Load, Outcome, Workload
from far_runtime.errors import FarError
from load_test import load_test
from report import comparison, report
from run import Plan, Result
from serve_process import ServerStats, check_loopback, serving

OPTIONS = ["--engine", "onnxruntime", "--threads", "1", "--no-check"]
ABOUT = {"condition": "labels", "count": 10}
_FILE = io.BytesIO()
Image.new("RGB", (2, 2)).save(_FILE, "png")
PNG = base64.b64encode(_FILE.getvalue()).decode()


def load_of(answer: Callable[[httpx.Request], httpx.Response], streams: float = 0.0, **settings: Any) -> Load:
    """A load on a server that answers in this way."""
    client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://127.0.0.1")
    return Load(client, Workload(0, ABOUT, streams, 1), **settings)


def test_a_seed_asks_the_same_whatever_the_number_of_clients() -> None:
    one, two, other = (Workload(seed, ABOUT, 0.5, 4, {"steps": 1}) for seed in (0, 0, 1))
    asked = [one.request(i) for i in range(200)]
    assert asked == [two.request(i) for i in range(200)]
    assert asked != [other.request(i) for i in range(200)]
    assert {route for route, _ in asked} == {GENERATE, STREAM}
    assert {body["n"] for _, body in asked} == {1, 2, 3, 4}
    assert {body["label"] for _, body in asked} == set(range(10))
    text = Workload(0, {"condition": "text", "count": None}, 0, 1, {}, ("a cat",))
    assert text.request(0)[1]["prompt"] == "a cat"


def test_what_goes_wrong_is_put_down_by_kind() -> None:
    error = {"error": {"code": "queue_full"}}
    events = {"an end": "event: done\ndata: {}\n\n", "none": "event: level\ndata: {}\n\n"}

    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("incomplete")

    cases: list[tuple[Any, float, str]] = [
        (lambda request: httpx.Response(429, json=error, headers={"retry-after": "0"}), 0.0, "429 queue_full"),
        (lambda request: httpx.Response(500, json={"error": {"code": "internal_error"}}), 1.0, "500 internal_error"),
        (lambda request: httpx.Response(502, text="<html>"), 0.0, "a malformed response: JSONDecodeError"),
        (lambda request: httpx.Response(200, json={"data": []}), 0.0, "a malformed response: ValueError"),
        (gone, 0.0, "RemoteProtocolError"),
        (sse("event: error\ndata: " + '{"error": {"code": "deadline"}}' + "\n\n"), 1.0, "in a stream: deadline"),
        (sse(events["none"]), 1.0, "a stream that broke off"),
        (sse(events["an end"]), 1.0, "a malformed response: ValueError"),
    ]
    for answer, streams, expected in cases:
        load = load_of(answer, streams, max_requests=1)
        asyncio.run(load.closed_loop(1))
        assert [one.error for one in load.outcomes] == [expected]


def sse(text: str) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


def test_seconds_of_the_open_loop_count_from_when_a_request_was_due() -> None:
    """A loop that is held up for a fifth of a second sends late; the answers come at once."""
    held = [True]

    def answer(request: httpx.Request) -> httpx.Response:
        if held[0]:
            held[0] = False
            time.sleep(0.2)  # the whole loop
        return httpx.Response(500, json={"error": {"code": "x"}})

    load = load_of(answer, max_requests=40)
    asyncio.run(load.open_loop(400))
    assert len(load.outcomes) == 40
    late = [one.seconds for one in load.outcomes if one.seconds > 0.1]
    assert len(late) > 10


def test_a_run_on_a_real_server_is_reported(tiny: Any) -> None:
    plan = Plan(0, 0.5, 2, {"steps": 1}, clients=3, seconds=60, requests=24, check=4, warm_up=0.5)
    with serving(tiny.bundle, OPTIONS) as address:
        made = asyncio.run(plan.run(address))
        opened = asyncio.run(Plan(0, 0.5, 2, {"steps": 1}, rate=50, seconds=60, requests=10, warm_up=0.1).run(address))
        turns = asyncio.run(
            Plan(0, 0, 1, {"steps": 1}, seconds=60, requests=4, warm_up=0.1).compare(address, address, 2)
        )
    numbers, lines, failed = report(made)
    assert not failed
    assert made.after is not None
    assert (numbers["requests"], numbers["errors"], numbers["refused"]) == (24, {}, 0)
    drawn = sum(Workload(0, ABOUT, 0.5, 2).request(i)[1]["n"] for i in range(24))
    assert numbers["pictures"] == drawn == made.after.pictures - made.warm.pictures
    assert len(made.differences) == 4
    assert max(made.differences) <= 1
    assert made.broken == ()
    assert made.after.memory > 1e6
    latencies = numbers["latencies"]
    assert latencies["whole answer"]["n"] == 24
    assert latencies["first level of a stream"]["n"] == latencies["streams"]["n"] > 0
    assert latencies["first level of a stream"]["p50"] < latencies["streams"]["p50"]
    assert sum(numbers["batches"].values()) > 0
    assert any("largest difference" in line for line in lines)
    assert len(opened.outcomes) == 10
    numbers, lines, failed = comparison(turns)
    assert len(numbers["ratios"]) == 2
    assert not failed


def test_refusals_are_no_errors_and_the_server_counts_them_too(tiny: Any) -> None:
    with serving(tiny.bundle, [*OPTIONS, "--queue", "1", "--max-batch", "1"]) as address:
        made = asyncio.run(Plan(0, 0, 1, {"steps": 100}, clients=6, seconds=2, check=0, warm_up=0.1).run(address))
    numbers, _, failed = report(made)
    assert not failed
    assert numbers["refused"] > 0
    assert made.after is not None
    assert made.after.refused["queue"] >= numbers["refused"]


STATS = ServerStats(1e8, 10.0, 1.0, 0.0, {}, {})


def result(*outcomes: Outcome, after: ServerStats | None = STATS, broken: tuple[str, ...] = ()) -> Result:
    return Result(list(outcomes), 2.0, STATS, STATS, after, [1e8, 1e8], [], broken)


DRAWN, REFUSED = Outcome(seconds=0.5, pictures=3), Outcome(seconds=0.1, error="429 queue_full")


def test_a_run_without_a_picture_has_failed() -> None:
    numbers, lines, failed = report(result(REFUSED, REFUSED))
    assert failed
    assert (numbers["refused"], numbers["errors"]) == (2, {})
    assert lines[-1] == "FAILED: no picture came"
    assert not report(result(DRAWN, REFUSED))[2]


def test_a_comparison_of_servers_that_drew_nothing_is_reported() -> None:
    numbers, lines, failed = comparison([(result(DRAWN), result(REFUSED)), (result(DRAWN), result(DRAWN))])
    assert failed
    assert numbers["ratios"] == [None, 1.0]
    assert "FAILED: round 1, one by one: no picture came" in lines
    numbers, lines, failed = comparison([(result(DRAWN), result())])
    assert failed
    assert numbers["ratio"] is None
    assert any(line.startswith("batched: p50") for line in lines)
    assert not any(line.startswith("one by one: p50") for line in lines)
    json.dumps(numbers, allow_nan=False)


class Pretender(BaseHTTPRequestHandler):
    """What load_test asks a server for, with `pictures` answers that are right; later ones are 429, or, where it
    `leaves`, none at all."""

    pictures: ClassVar[int]
    leaves: ClassVar[bool]

    def do_GET(self) -> None:
        if self.gone():
            return
        if self.path == "/metrics":
            self.reply(200, b"process_resident_memory_bytes 1000.0\n")
        elif self.headers["authorization"] != "Bearer a key":
            self.reply(401, b"{}")
        else:
            self.reply(200, json.dumps({"data": [{"far": ABOUT}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.gone():
            return
        if self.pictures > 0:
            type(self).pictures -= 1
            self.reply(200, json.dumps({"data": [{"seed": body["seed"], "b64_json": PNG}]}).encode())
        else:
            self.reply(429, b'{"error": {"code": "queue_full"}}')

    def gone(self) -> bool:
        self.close_connection = self.leaves and self.pictures <= 0
        return self.close_connection

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def pretender() -> Iterator[str]:
    Pretender.pictures, Pretender.leaves = 10**9, False
    with ThreadingHTTPServer(("127.0.0.1", 0), Pretender) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def load(monkeypatch: Any, url: str, file: Path, *arguments: str) -> Any:
    async def cold(*arguments: Any) -> None:
        pass

    monkeypatch.setattr(Plan, "_warm_up", cold)
    made = CliRunner(env={"FAR_KEY": "a key"}).invoke(
        load_test, ["--url", url, "--json", str(file), "--streams", "0", "--n", "1", "--clients", "1", *arguments]
    )
    return made, json.loads(file.read_text())


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        (True, ["/metrics cannot be read at the end: RemoteProtocolError", "not drawn again: RemoteProtocolError"]),
        (False, ["a picture was not drawn again: 429 queue_full"]),
    ],
)
def test_a_server_that_fails_at_the_end_is_reported(
    pretender: str, monkeypatch: Any, tmp_path: Path, leaves: bool, said: list[str]
) -> None:
    Pretender.pictures, Pretender.leaves = 4, leaves
    made, numbers = load(monkeypatch, pretender, tmp_path / "numbers.json", "--requests", "5", "--check", "2")
    assert made.exit_code == 1
    assert (numbers["requests"], numbers["pictures"]) == (5, 4)
    for what in said:
        assert what in made.output
        assert any(what in one for one in numbers["broken"])
    assert "a key" not in json.dumps(numbers)


def test_a_server_that_refuses_everything_fails(pretender: str, monkeypatch: Any, tmp_path: Path) -> None:
    Pretender.pictures = 0
    made, numbers = load(monkeypatch, pretender, tmp_path / "numbers.json", "--requests", "3")
    assert made.exit_code == 1
    assert "FAILED: no picture came" in made.output
    assert numbers["refused"] == 3


def test_a_key_is_asked_for(pretender: str) -> None:
    for key in ("", "another"):
        with pytest.raises(FarError, match="needs an API key; give it as FAR_KEY or by --key"):
            CliRunner().invoke(load_test, ["--url", pretender, "--key", key], catch_exceptions=False)


def test_a_round_that_cannot_begin_leaves_the_earlier_ones(monkeypatch: Any) -> None:
    left = [result(DRAWN), result(DRAWN), None]

    async def run(plan: Plan, address: str, key: str = "") -> Result:
        if (made := left.pop(0)) is None:
            raise FarError("gone")
        return made

    monkeypatch.setattr(Plan, "run", run)
    turns = asyncio.run(Plan(0, 0, 1).compare("a", "b", 3))
    _, lines, failed = comparison(turns)
    assert failed
    assert len(turns) == 1
    assert lines[-1] == "FAILED: round 1, one by one: round 2: gone"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either a BUNDLE"),
        (["here", "--url", "http://127.0.0.1:1"], "either a BUNDLE"),
        (["--url", "http://example.org"], "--elsewhere"),
        (["--url", "http://127.0.0.1:1", "--compare-batching"], "give a BUNDLE"),
        (["--url", "http://127.0.0.1:1", "--ask", "[1]"], "JSON object"),
        (["--url", "http://127.0.0.1:1", "--json", "."], "--json"),
        (["--url", "http://127.0.0.1:1"], "no far serve answers"),
        (["nowhere"], "did not start: .*no such bundle"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], said: str) -> None:
    with pytest.raises(FarError, match=said):
        CliRunner().invoke(load_test, arguments, catch_exceptions=False)


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.1.2.3", "http://[::1]:80"])
def test_this_machine_is_known(url: str) -> None:
    check_loopback(url)


def test_metrics_are_read() -> None:
    text = """
# TYPE far_batch_size histogram
far_batch_size_bucket{le="1.0",model="a"} 2.0
far_batch_size_bucket{le="2.0",model="a"} 2.0
far_batch_size_bucket{le="4.0",model="a"} 5.0
far_batch_size_bucket{le="+Inf",model="a"} 5.0
# TYPE far_pictures counter
far_pictures_total{model="a"} 14.0
# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes 1000.0
"""
    seen = ServerStats.parse(text)
    assert (seen.batches, seen.pictures, seen.memory, seen.files) == ({1: 2, 4: 3}, 14, 1000, 0)
