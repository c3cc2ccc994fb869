"""Malformed requests by Schemathesis: the server bears some hundreds, and what is wrong with one would be found."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx2 as httpx
import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra dev, Python 3.11)")

from hypothesis import strategies

from far_runtime.serve.schema import ErrorBody, ErrorDetail
from fuzz_server import BROKEN, RIGHT, FuzzReport, Target, check_end, fuzz, judge_memory, send, server_errors, show
from serve_process import serving


def test_malformed_requests_are_refused_as_the_document_says(tiny: Any) -> None:
    with serving(tiny.bundle, ["--engine", "onnxruntime", "--threads", "1", "--no-check"]) as address:
        model = httpx.get(f"{address}/v1/models").json()["data"][0]["far"]
        report = fuzz(Target(address, model), 124, seed=1, series=10)
        check_end(address, report, model)
    assert report.requests == 124
    assert (len(report.memory) >= 2, report.unjudged) == (True, "")
    assert report.failures == {}
    posts = [statuses for route, statuses in report.statuses.items() if route.startswith("POST")]
    assert len(posts) == 3
    for statuses in posts:
        assert statuses["broken 400"] >= 15
        assert statuses["right 400"] > 0
        assert statuses["likely 200"] > 0


class CarelessServer(BaseHTTPRequestHandler):
    """A server that says in its document that n is 1 to 4, and does not look."""

    document: ClassVar[dict[str, Any]] = {
        "openapi": "3.1.0",
        "info": {"title": "careless", "version": "1"},
        "paths": {
            "/draw": {
                "post": {
                    "requestBody": {
                        "required": True,
                        "content": {
                            "application/json": {
                                "schema": {
                                    "type": "object",
                                    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 4}},
                                    "required": ["n"],
                                }
                            }
                        },
                    },
                    "responses": {
                        "200": {
                            "description": "drawn",
                            "content": {"application/json": {"schema": {"type": "object", "required": ["data"]}}},
                        }
                    },
                }
            }
        },
    }

    def do_GET(self) -> None:
        answer = json.dumps(self.document).encode() if self.path == "/openapi.json" else b""
        self.reply(200, answer)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if b"{" not in body:
            self.reply(500, b'{"data": []}')
        else:
            self.reply(200, b"{}" if len(body) % 2 else b'{"data": []}')

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def fuzzed(count: int) -> FuzzReport:
    """What comes of a CarelessServer server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), CarelessServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            return fuzz(Target(f"http://127.0.0.1:{server.server_address[1]}"), count, seed=0)
        finally:
            server.shutdown()
            thread.join()


def test_a_route_for_which_no_request_can_be_made_is_found_out() -> None:
    class Never:
        method, path = "post", "/never"

        def as_strategy(self, **settings: Any) -> Any:
            return strategies.integers().filter(lambda number: False)

    report, target = FuzzReport(0), Target("http://127.0.0.1:1")
    send(Never(), BROKEN, target, report, 2, seed=0)
    assert report.failures == {}
    send(Never(), RIGHT, target, report, 2, seed=0)
    assert list(report.failures) == ["POST /never: making right requests: Unsatisfiable"]


def test_routes_that_are_not_come_to_are_failures(monkeypatch: Any) -> None:
    paths = {**CarelessServer.document["paths"], "/late": CarelessServer.document["paths"]["/draw"]}
    monkeypatch.setattr(CarelessServer, "document", {**CarelessServer.document, "paths": paths})
    report = fuzzed(20)
    assert "no request of POST /late was sent: none could be made, or --requests is too small" in report.failures


def test_a_server_that_does_not_do_as_it_says_is_found_out() -> None:
    report = fuzzed(60)
    what = " ".join(report.failures)
    for title in ("Server error", "Response violates schema", "Schema-violating request accepted"):
        assert title in what
    assert report.requests == 60


@pytest.mark.parametrize(
    ("memory", "unjudged", "failures"),
    [
        ([1e8], True, []),
        ([], True, []),
        ([0.0, 0.0], True, []),
        ([1e8, 1.3e8], False, []),
        ([1e8, 1e8, 1.4e8], False, ["memory grew from 100 to 140 MB"]),
    ],
)
def test_memory_is_judged_or_said_not_to_be(
    capsys: Any, memory: list[float], unjudged: bool, failures: list[str]
) -> None:
    report = FuzzReport(0, memory=memory)
    judge_memory(report)
    show(report)
    assert list(report.failures) == failures
    assert bool(report.unjudged) == unjudged
    assert ("memory was not judged" in capsys.readouterr().out) == unjudged


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("event: level\ndata: {}\n\n", "validation error"),
        ("event: hello\ndata: {}\n\n", "hello"),
        ("event: done", "Invalid JSON"),
    ],
)
def test_a_stream_that_is_none_is_found_out(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        server_errors(text)


def test_faults_of_the_server_in_a_stream_are_found() -> None:
    body = ErrorBody(error=ErrorDetail(message="no", type="server_error", param=None, code="internal_error"))
    assert server_errors(f"event: error\ndata: {body.model_dump_json()}\n\n") == ["internal_error"]
    body.error.type = "invalid_request_error"
    assert server_errors(f"event: error\ndata: {json.dumps(body.model_dump())}\n\n") == []
