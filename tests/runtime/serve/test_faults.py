"""What goes wrong around a server: clients that send rubbish, leave, or do not read; an engine that fails; a kill."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import uvicorn

from far_runtime.bundle import open_bundle
from far_runtime.cli.serve import listen
from far_runtime.engines.base import EngineOptions
from far_runtime.serve import events as streams
from far_runtime.serve.app import create_app
from far_runtime.serve.batching import QueueConfig
from far_runtime.serve.metrics import Metrics
from far_runtime.serve.models import Model, open_model
from far_runtime.serve.service import Limits, Service

GENERATE, STREAM = "/v1/images/generations", "/v1/generate/stream"
JSON = {"content-type": "application/json"}
DRAWN = {"label": 0, "steps": 1, "seed": 0}
COMMAND = [sys.executable, "-c", "import sys; from far_runtime.cli.main import main; main(sys.argv[1:])", "serve"]


def place(address: str) -> tuple[str, int]:
    host, port = address.removeprefix("http://").split(":")
    return host, int(port)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\nContent-Length: -1\r\n\r\n",
        b"POST " + GENERATE.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST " + GENERATE.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnot hex\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000,
        b"\r\n\r\n\x00\xff" * 100,
    ],
    ids=["tls", "version", "header", "length", "lengths", "chunk", "path", "headers", "noise"],
)
def test_what_is_no_http_is_refused_and_harms_nothing(address: str, client: httpx.Client, sent: bytes) -> None:
    received = b""
    with socket.create_connection(place(address), timeout=30) as raw, contextlib.suppress(ConnectionError):
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        while part := raw.recv(65536):
            received += part
    assert not received or re.match(rb"HTTP/1\.1 4\d\d ", received)  # an response, or hung up on
    assert client.post(GENERATE, json=DRAWN).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 500_000,
        b'{"label":' * 100_000 + b"0" + b"}" * 100_000,
        b'{"label": 0, "n": 1' + b"0" * 10_000 + b"}",
        b'{"label": 0, "guidance": 1e999}',
        b'{"label": 0, "guidance": 101}',
        b'{"label": 0, "guidance": NaN}',
        b'{"label": 0, "temperature": -Infinity}',
        b'{"label": 0, "seed": 1e300}',
        b'{"label": 0, "steps": [1, 1, 1, 1' + b", 1" * 2000 + b"]}",
        b'{"label": "\\ud800"}',
        b'{"prompt": "\\udfff", "model": "bundle_t2i"}',
        b'{"label": "\xc3\x28"}',
        b'{"model": "\\u0000../../etc/passwd", "label": 0}',
        b'{"label": 0} {"label": 0}',
        b"",
        b"null",
        b"label=0&steps=1",
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_is_an_error_of_the_request(client: httpx.Client, body: bytes) -> None:
    for route in (GENERATE, STREAM):
        response = client.post(route, content=body, headers=JSON)
        assert response.status_code in (400, 404)
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", ""])
def test_a_body_of_another_kind_is_not_read_as_json(client: httpx.Client, kind: str) -> None:
    response = client.post(GENERATE, content=json.dumps(DRAWN), headers={"content-type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")


def test_clients_that_leave_in_the_middle_of_a_body_or_a_stream_leave_nothing_behind(
    address: str, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST {STREAM} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    whole = json.dumps({"label": 0, "steps": 200, "n": 2}).encode()
    for body in (whole[:9], whole) * 8:
        with socket.create_connection(place(address)) as gone:
            gone.sendall(f"{head}{len(whole)}\r\n\r\n".encode() + body)
    wait_until(lambda: 'far_queue_length{model="bundle"} 0.0' in client.get("/metrics").text)
    assert client.post(GENERATE, json=DRAWN).status_code == 200
    gc.collect()  # what asyncio has to complain about, it says when a task goes
    assert not caplog.records


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def poisoned(seed: int) -> Callable[[Model], None]:
    """A model whose engine fails after the first level wherever a picture of this seed is in the batch."""

    def prepare(model: Model) -> None:
        generate = model.batcher.pipeline.generate

        def failing(subjects: Any, seeds: Any, *, on_progress: Any, **keywords: Any) -> Any:
            def raising(progress: Any) -> None:
                if progress.step.index and seed in seeds:
                    raise RuntimeError("secret of the engine")
                on_progress(progress)

            return generate(subjects, seeds, on_progress=raising, **keywords)

        model.batcher.pipeline.generate = failing  # type: ignore[method-assign]

    return prepare


def test_a_picture_that_fails_in_the_middle_of_a_batch_fails_alone(
    serve: Any, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    responses: dict[tuple[str, int], httpx.Response] = {}
    with serve(tiny.bundle, queue=QueueConfig(4, 20.0), prepare=poisoned(2)) as address:

        def ask(route: str, seed: int) -> None:
            responses[route, seed] = httpx.post(f"{address}{route}", json={**DRAWN, "seed": seed}, timeout=60)

        for route in (GENERATE, STREAM):
            threads = [threading.Thread(target=ask, args=(route, seed)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert [responses[GENERATE, seed].status_code for seed in range(4)] == [200, 200, 500, 200]
    error = responses[GENERATE, 2].json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    for seed in range(4):
        names = re.findall(r"^event: (\w+)$", responses[STREAM, seed].text, re.MULTILINE)
        assert names == (["level", "level", "error"] if seed == 2 else ["level"] * 4 + ["picture", "done"])
    assert not any("secret" in response.text for response in responses.values())
    assert [record.getMessage() for record in caplog.records] == ["the picture of seed 2 was not drawn"] * 2
    assert "secret of the engine" in caplog.text


def test_numbers_out_of_range_are_a_fault_of_the_server_and_speak_of_no_option(
    serve: Any, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [True]

    def prepare(model: Model) -> None:
        engine = model.batcher.pipeline.engine
        run = engine.run

        def infinite(stage: str, *arguments: Any, **keywords: Any) -> Any:
            outputs = run(stage, *arguments, **keywords)
            if not broken[0] or stage != "denoise":
                return outputs
            return {name: engine.put(np.full_like(engine.get(array), np.inf)) for name, array in outputs.items()}

        engine.run = infinite  # type: ignore[method-assign]

    with serve(tiny.bundle, prepare=prepare) as address, httpx.Client(base_url=address, timeout=60) as client:
        response = client.post(GENERATE, json=DRAWN)
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "out_of_range")
        assert "--" not in error["message"]
        assert "the latents are not finite with levels" in caplog.text
        broken[0] = False
        assert client.post(GENERATE, json=DRAWN).status_code == 200


def test_a_client_that_reads_slowly_misses_levels_but_no_picture(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen levels, of which four may wait while nothing is read."""
    monkeypatch.setattr(streams, "MAX_WAITING_LEVELS", 4)
    model = open_model("tiny", open_bundle(tiny.bundle), "onnxruntime", EngineOptions(threads=1), QueueConfig())
    app = create_app(Service([model], Metrics(), Limits()))
    body = json.dumps({**DRAWN, "n": 4}).encode()
    ends: list[asyncio.Event] = []
    sent = b""

    async def send(message: Any) -> None:
        nonlocal sent
        if message.get("body") and not sent:  # the first event is not taken before everything is drawn
            wait = asyncio.get_running_loop().time() + 60
            while model.batcher.pipeline.drawn < 4:  # type: ignore[attr-defined]
                assert asyncio.get_running_loop().time() < wait
                await asyncio.sleep(0.01)
        sent += message.get("body", b"")

    async def receive() -> Any:
        if ends:
            await asyncio.Event().wait()
        ends.append(asyncio.Event())
        return {"type": "http.request", "body": body, "more_body": False}

    generate = model.batcher.pipeline.generate
    model.batcher.pipeline.drawn = 0  # type: ignore[attr-defined]

    def counting(subjects: Any, *arguments: Any, **keywords: Any) -> Any:
        generation = generate(subjects, *arguments, **keywords)
        model.batcher.pipeline.drawn += len(subjects)  # type: ignore[attr-defined]
        return generation

    model.batcher.pipeline.generate = counting  # type: ignore[method-assign]
    scope = {
        "type": "http", "method": "POST", "path": STREAM, "raw_path": STREAM.encode(), "root_path": "",
        "scheme": "http", "query_string": b"", "http_version": "1.1", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
    model.batcher.close()
    names = re.findall(r"^event: (\w+)$", sent.decode(), re.MULTILINE)
    assert names[-5:] == ["picture"] * 4 + ["done"]
    assert 1 <= names.count("level") <= 8
    steps = re.findall(r'"step":(\d)', sent.decode())
    assert steps[-4:] == ["3"] * 4  # the newest are those that were kept


@pytest.mark.skipif(sys.platform != "linux", reason="Linux hangs up by itself")
def test_a_request_is_cancelled_if_the_client_is_gone_before_the_first_event() -> None:
    cancelled: list[bool] = []
    queued: Any = SimpleNamespace(cancel=lambda: cancelled.append(True))

    async def nothing() -> AsyncIterator[str]:
        yield "never sent"

    async def gone(message: Any) -> None:
        raise ConnectionError("the client is gone")

    async def disconnected() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with contextlib.suppress(Exception):  # whatever the framework makes of it
        asyncio.run(streams.EventStreamResponse(nothing(), queued)(scope, disconnected, gone))
    assert cancelled == [True]


def test_a_client_that_reads_nothing_is_hung_up_on(tiny: Any) -> None:
    model = open_model("tiny", open_bundle(tiny.bundle), "onnxruntime", EngineOptions(threads=1), QueueConfig())
    app = create_app(Service([model], Metrics(), Limits()))
    listening = listen("127.0.0.1", 0, stall_seconds=0.5)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    body = json.dumps({**DRAWN, "n": 8}).encode()
    try:
        wait_until(lambda: server.started)
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            lazy.connect(listening.getsockname())
            head = f"POST {STREAM} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            lazy.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: bool(server.server_state.connections))
            wait_until(lambda: not server.server_state.connections)
            taken = 0
            with pytest.raises(ConnectionResetError):
                while part := lazy.recv(65536):
                    taken += len(part)
            assert taken < 20_000
    finally:
        server.should_exit = True
        thread.join()


def test_a_server_that_is_killed_breaks_the_stream_off_for_its_client(tiny: Any, tmp_path: Path) -> None:
    command = [*COMMAND, f"one={tiny.bundle}", "--port", "0", "--engine", "onnxruntime", "--threads", "1"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as server:
        assert server.stdout is not None
        match = re.match(r"serving one at (http://127\.0\.0\.1:\d+) ", server.stdout.readline().decode())
        assert match
        body = {"label": 0, "steps": 1000, "n": 8}
        with (
            pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)),
            httpx.stream("POST", f"{match[1]}{STREAM}", json=body, timeout=60) as response,
        ):
            lines = response.iter_lines()
            assert next(lines) == "event: level"
            server.kill()
            assert "event: done" not in list(lines)
        assert server.wait(60) == -signal.SIGKILL
