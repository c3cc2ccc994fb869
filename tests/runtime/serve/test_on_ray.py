"""`far serve --ray` with two replicas on a cluster of its own: the same answers, streams, refusals and end."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image

from far_runtime.cli.main import main
from far_runtime.pipeline import Pipeline

pytest.importorskip("ray.serve", reason="ray is not installed")
pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-c", "import sys; from far_runtime.cli.main import main; main(sys.argv[1:])", "serve"]
GENERATE, STREAM = "/v1/images/generations", "/v1/generate/stream"


@pytest.fixture(scope="module")
def server(tiny: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command and its address."""
    command = [*COMMAND, f"one={tiny.bundle}", "--port", "0", "--engine", "onnxruntime", "--threads", "1", "--ray",
               "--replicas", "2", "--cpus-per-replica", "0.5"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as opened:
        assert opened.stdout is not None
        line = opened.stdout.readline()
        match = re.match(r"serving one at (http://127\.0\.0\.1:\d+) .*2 replicas on Ray", line)
        if not match:
            opened.terminate()
            pytest.fail(f"{line}{opened.communicate()[1]}")
        yield opened, match[1]
        opened.terminate()


def pixels_of(file: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB"))


def test_openais_client_gets_the_picture_that_far_generate_draws(server: Any, pipeline: Pipeline) -> None:
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["one"]
    expected = pipeline.generate([3, 3], [7, 8], guidance=1.5, steps="2").images
    for _ in range(4):  # whichever replica answers
        response = client.images.generate(prompt="3", n=2, extra_body={"seed": 7, "guidance": 1.5, "steps": 2})
        assert response.data is not None
        for picture, pixels in zip(response.data, expected, strict=True):
            assert (pixels_of(picture.b64_json or "") == pixels).all()
    with pytest.raises(openai.BadRequestError, match="no class of that name"):
        client.images.generate(prompt="no such thing")


def test_both_replicas_draw_and_the_guards_hold(server: Any) -> None:
    """A replica's metrics are its own, and tell when its process began."""
    with httpx.Client(base_url=server[1], timeout=60) as client:

        def ask(i: int) -> int:
            return client.post(GENERATE, json={"label": i % 10, "seed": i, "steps": 100}).status_code

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(24))) == {200}
        drawn = {}
        for _ in range(60):
            text = client.get("/metrics").text
            (started,) = re.findall(r"^process_start_time_seconds (\S+)", text, re.M)
            (drawn[started],) = re.findall(r'^far_pictures_total{model="one"} (\S+)', text, re.M)
        assert len(drawn) == 2
        assert sum(map(float, drawn.values())) >= 24
        assert client.post(GENERATE, content=b" " * (2 << 20)).status_code == 413
        assert client.get("/healthz", headers={"Host": "elsewhere.example"}).status_code == 421
        assert client.get("/").status_code == 200


def test_sigterm_lets_a_stream_finish(server: Any) -> None:
    command, address = server
    body = {"label": 0, "steps": 300, "n": 2}
    with httpx.stream("POST", address + STREAM, json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines) == "event: level"
        command.send_signal(signal.SIGTERM)
        events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert events[-3:] == ["picture"] * 2 + ["done"]
    assert command.wait(90) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "2"], "--replicas: for --ray alone"),
        (["--ray", "--replicas", "0"], "expected N or MIN:MAX"),
        (["--ray", "--replicas", "3:2"], "expected N or MIN:MAX"),
        (["--ray", "--resource", "jetson=none"], "expected NAME=AMOUNT"),
        (["--ray", "--address", "127.0.0.1:9"], "no Ray cluster answers at 127.0.0.1:9"),
        (["--ray", "--gpus-per-replica", "1000000"], "1e+06 GPU each"),
        (["--ray", "--engine", "none"], "the replicas do not start: engine 'none': unknown"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    tiny: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tiny.bundle), "--port", "0", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
