"""The load test as a command: on a real server, on servers that fail, and with options that cannot be."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from PIL import Image

import load_test as command
from clients import Outcome, Workload
from far_runtime.errors import FarError
from load_test import load_test
from report import comparison, report
from run import Plan, Result
from serve_process import ServerStats, serving

OPTIONS = ["--engine", "onnxruntime", "--threads", "1", "--no-check"]
MODEL = {"condition": "labels", "count": 10}
_FILE = io.BytesIO()
Image.new("RGB", (2, 2)).save(_FILE, "png")
PNG = base64.b64encode(_FILE.getvalue()).decode()


def test_a_real_server_is_tested(tiny: Any) -> None:
    plan = Plan(0, 0.5, 2, {"steps": 1}, clients=3, seconds=60, requests=24, check=4, warm_up=0.5)
    with serving(tiny.bundle, OPTIONS) as address:
        result = asyncio.run(plan.run(address))
        opened = asyncio.run(Plan(0, 0.5, 2, {"steps": 1}, rate=50, seconds=60, requests=10, warm_up=0.1).run(address))
        pairs = asyncio.run(
            Plan(0, 0, 1, {"steps": 1}, seconds=60, requests=4, warm_up=0.1).compare(address, address, 2)
        )
    numbers, lines, failed = report(result)
    assert not failed
    assert result.after is not None
    assert (numbers["requests"], numbers["errors"], numbers["refused"]) == (24, {}, 0)
    expected = sum(Workload(0, MODEL, 0.5, 2).request(i)[1]["n"] for i in range(24))
    assert numbers["pictures"] == expected == result.after.pictures - result.warm.pictures
    assert len(result.differences) == 4
    assert max(result.differences) <= 1
    assert result.after.memory > 1e6
    latencies = numbers["latencies"]
    assert latencies["whole answer"]["n"] == 24
    assert latencies["first level of a stream"]["n"] == latencies["streams"]["n"] > 0
    assert latencies["first level of a stream"]["p50"] < latencies["streams"]["p50"]
    assert sum(numbers["batches"].values()) > 0
    assert any("largest difference" in line for line in lines)
    assert [outcome.error for outcome in opened.outcomes] == [""] * 10
    numbers, lines, failed = comparison(pairs)
    assert len(numbers["ratios"]) == 2
    assert not failed


def test_rejections_are_no_errors_and_the_server_counts_them_too(tiny: Any) -> None:
    with serving(tiny.bundle, [*OPTIONS, "--queue", "1", "--max-batch", "1"]) as address:
        result = asyncio.run(Plan(0, 0, 1, {"steps": 100}, clients=6, seconds=2, check=0, warm_up=0.1).run(address))
    numbers, _, failed = report(result)
    assert not failed
    assert numbers["refused"] > 0
    assert result.after is not None
    assert result.after.refused["queue"] >= numbers["refused"]


class Pretender(BaseHTTPRequestHandler):
    """Answers what load_test asks of a server."""

    pictures: ClassVar[int]
    """How many pictures it sends; later requests are rejected with 429."""

    disconnects: ClassVar[bool]
    """Whether later requests are not answered at all."""

    def do_GET(self) -> None:
        if self.gone():
            return
        if self.path == "/metrics":
            self.reply(200, b"process_resident_memory_bytes 1000.0\n")
        elif self.headers["authorization"] != "Bearer a key":
            self.reply(401, b"{}")
        else:
            self.reply(200, json.dumps({"data": [{"far": MODEL}]}).encode())

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
        self.close_connection = self.disconnects and self.pictures <= 0
        return self.close_connection

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def pretender_address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pretender) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def pretender(pretender_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a pretender, which is not warmed up."""

    async def cold(*arguments: Any) -> None:
        pass

    monkeypatch.setattr(Plan, "_warm_up", cold)
    Pretender.pictures, Pretender.disconnects = 10**9, False
    return pretender_address


def load(url: str, file: Path, *arguments: str) -> Any:
    result = CliRunner(env={"FAR_KEY": "a key"}).invoke(
        load_test, ["--url", url, "--json", str(file), "--streams", "0", "--n", "1", "--clients", "1", *arguments]
    )
    return result, json.loads(file.read_text())


def test_a_test_that_passes_exits_with_0(pretender: str, tmp_path: Path) -> None:
    result, numbers = load(pretender, tmp_path / "numbers.json", "--requests", "5", "--check", "2", "--minutes", "2")
    assert result.exit_code == 0, result.output
    assert (numbers["requests"], numbers["pictures"], numbers["differences"]) == (5, 5, [0, 0])
    assert "5 requests in" in result.output
    assert (numbers["plan"]["seconds"], numbers["plan"]["rate"], numbers["plan"]["streams"]) == (120, None, 0)
    _, numbers = load(pretender, tmp_path / "numbers.json", "--requests", "3", "--rate", "100", "--streams", "0.5")
    assert (numbers["plan"]["rate"], numbers["plan"]["streams"]) == (100, 0.5)


@pytest.mark.parametrize(
    ("disconnects", "failures"),
    [
        (True, ["/metrics cannot be read at the end: RemoteProtocolError", "not drawn again: RemoteProtocolError"]),
        (False, ["a picture was not drawn again: 429 queue_full", "a picture was not drawn again: 429 queue_full"]),
    ],
)
def test_a_server_that_fails_at_the_end_is_reported(
    pretender: str, tmp_path: Path, disconnects: bool, failures: list[str]
) -> None:
    Pretender.pictures, Pretender.disconnects = 4, disconnects
    result, numbers = load(pretender, tmp_path / "numbers.json", "--requests", "5", "--check", "2")
    assert result.exit_code == 1
    assert (numbers["requests"], numbers["pictures"]) == (5, 4)
    assert len(numbers["broken"]) == len(failures)
    for failure, told in zip(failures, numbers["broken"], strict=True):
        assert failure in told
        assert failure in result.output
    assert "a key" not in json.dumps(numbers)


def test_a_server_that_rejects_everything_fails(pretender: str, tmp_path: Path) -> None:
    Pretender.pictures = 0
    result, numbers = load(pretender, tmp_path / "numbers.json", "--requests", "3")
    assert result.exit_code == 1
    assert "FAILED: no picture came" in result.output
    assert numbers["refused"] == 3


def test_a_key_is_asked_for(pretender: str) -> None:
    for key in ("", "another"):
        with pytest.raises(FarError, match="needs an API key; give it as FAR_KEY or by --key"):
            CliRunner().invoke(load_test, ["--url", pretender, "--key", key], catch_exceptions=False)


def test_batching_is_compared_with_a_server_that_draws_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    @contextlib.contextmanager
    def fake_serving(bundle: Path, options: Any) -> Iterator[str]:
        started.append([str(bundle), *options])
        yield f"server {len(started)}"

    stats = ServerStats(memory=1e8, files=1.0, cpu=1.0, pictures=0.0, refused={}, batches={})
    result = Result([Outcome(seconds=1.0, pictures=1)], 2.0, stats, stats, stats, [1e8], [])

    async def compare(plan: Plan, *arguments: Any) -> list[tuple[Result, Result]]:
        assert arguments == ("server 1", "server 2", 2, "")
        return [(result, result)]

    monkeypatch.setattr(command, "serving", fake_serving)
    monkeypatch.setattr(Plan, "compare", compare)
    arguments = ["bundle", "--compare-batching", "--rounds", "2", "--", "--threads", "1"]
    ran = CliRunner().invoke(load_test, arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    assert started == [["bundle", "--threads", "1"], ["bundle", "--threads", "1", "--max-batch", "1"]]
    assert "batching draws 1.00 times as many" in ran.output


NOBODY = "no far serve answers there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a BUNDLE"),
        (["here", "--url", "http://127.0.0.1:1"], "either a BUNDLE"),
        (["--url", "http://example.org"], "is another machine; .*--elsewhere"),
        (["--url", "http://127.0.0.1.example.org:1"], "is another machine"),
        (["--url", "http://[::2]:1"], "is another machine"),
        (["--url", "http://nowhere.invalid:1", "--elsewhere"], NOBODY),
        (["--url", "http://127.0.0.1:1"], NOBODY),
        (["--url", "http://localhost:1"], NOBODY),
        (["--url", "http://127.1.2.3:1"], NOBODY),
        (["--url", "http://[::1]:1"], NOBODY),
        (["--url", "http://127.0.0.1:1", "--compare-batching"], "give a BUNDLE"),
        (["--url", "http://127.0.0.1:1", "--ask", "[1]"], "JSON object"),
        (["--url", "http://127.0.0.1:1", "--json", "."], "--json"),
        (["--url", "http://127.0.0.1:1", "--key", "é"], "characters that a header cannot carry"),
        (["nowhere"], "did not start: .*no such bundle"),
    ],
)
def test_options_that_cannot_be_are_an_error(arguments: list[str], message: str) -> None:
    with pytest.raises(FarError, match=message):
        CliRunner().invoke(load_test, arguments, catch_exceptions=False)
