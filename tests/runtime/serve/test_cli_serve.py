"""`far serve` as a command: it serves, ends in good order at SIGTERM, and says what is wrong."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from far_runtime.bundle import open_bundle
from far_runtime.cli.main import main
from far_runtime.cli.serve import proxy_address
from far_runtime.engines.base import EngineOptions
from far_runtime.errors import FarError
from far_runtime.serve.batching import QueueConfig
from far_runtime.serve.models import open_model

COMMAND = [sys.executable, "-c", "import sys; from far_runtime.cli.main import main; main(sys.argv[1:])", "serve"]


def test_sigterm_lets_what_runs_finish(tiny: Any) -> None:
    command = [*COMMAND, f"one={tiny.bundle}", "--port", "0", "--engine", "onnxruntime", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        match = re.match(r"serving one at (http://127\.0\.0\.1:\d+) ", line)
        assert match, line
        body = {"label": 0, "steps": 200, "n": 4}
        with httpx.stream("POST", f"{match[1]}/v1/generate/stream", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: level"
            server.send_signal(signal.SIGTERM)
            events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert events[-5:] == ["picture"] * 4 + ["done"]
        assert server.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{b}", "{b}"], "NAME=BUNDLE"),
        (["nowhere"], "no such bundle"),
        (["no/such name={b}"], "letters"),
        (["{b}", "--keys", "{tmp}/none"], "one key per line"),
        (["{b}", "--keys", "{tmp}/empty"], "has no key"),
        (["{b}", "--keys", "{tmp}/short"], "line 2 is too short"),
        (["{b}", "--port", "{taken}"], "choose another --port"),
        (["{b}", "--engine", "onnx"], "unknown"),
        (["{b}", "--grace", "nan"], "is not a number of seconds"),
        (["{b}", "--deadline", "inf"], "0<x<=86400"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    tiny: Any, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "short").write_text("# ours\nshort\n")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        values = {"b": tiny.bundle, "tmp": tmp_path, "taken": taken.getsockname()[1]}
        main(["serve", "--port", "0", *(argument.format(**values) for argument in arguments)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_why_an_engine_was_chosen_is_said_and_which_options_are_not_its_own(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        main(["serve", f"one={tiny.bundle}", f"two={tiny.bundle}", "--port", "0", "--weight-budget", "3"])
    first, second = capsys.readouterr().err.splitlines()
    assert re.match(r"warning: --weight-budget: of tensorrt and tensorrt-rtx, nothing to \S+$", first)
    assert re.match(r"engine \S+: .+; --engine chooses another$", second)


def test_a_bundle_that_cannot_read_its_prompts_is_not_served(tiny: Any) -> None:
    bundle = open_bundle(tiny.t2i_bundle)
    without = tuple(graph for graph in bundle.manifest.graphs if graph.stage != "text")
    silent = replace(bundle, manifest=replace(bundle.manifest, graphs=without))
    with pytest.raises(FarError, match="has no text encoder, so it takes no prompts; export it again"):
        open_model("silent", silent, "onnxruntime", EngineOptions(threads=1), QueueConfig())


def test_rays_proxies_listen_where_they_do_already_or_where_it_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FarError, match="choose another --port"):
            proxy_address("127.0.0.1", port, None)
        assert proxy_address("127.0.0.1", port, ("localhost", 8123)) == ("localhost", 8123)
    host, free = proxy_address("127.0.0.1", 0, None)
    assert host == "127.0.0.1" and free > 0


@pytest.mark.parametrize(
    ("body", "running", "reach"), [("127.0.0.1", "0.0.0.0", "other machines"), ("0.0.0.0", "::1", "this machine alone")]
)
def test_rays_proxies_are_for_other_machines_only_if_that_is_said(body: str, running: str, reach: str) -> None:
    with pytest.raises(FarError, match=rf"listens at {running}:8000, for {reach}; confirm that with --host {running}"):
        proxy_address(body, 8000, (running, 8000))
