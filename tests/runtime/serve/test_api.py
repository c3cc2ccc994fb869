"""The API over real servers and engines: OpenAI's own client, streams, errors, limits, keys."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image

from far_runtime.engines.base import EngineOptions
from far_runtime.images.writing import read_metadata
from far_runtime.pipeline import Pipeline
from far_runtime.serve.auth import ApiKeys, RateLimiter
from far_runtime.serve.batching import QueueConfig
from far_runtime.serve.events import partial_image_steps
from far_runtime.serve.models import Model
from far_runtime.serve.service import Limits

GENERATE, STREAM = "/v1/images/generations", "/v1/generate/stream"


def pixels_of(file: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))).convert("RGB"))


def events_of(text: str) -> list[tuple[str, Any]]:
    parts = [part.split("\n") for part in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return dict(error)


def test_openais_client_lists_models_and_gets_the_picture_that_far_generate_draws(
    address: str, tiny: Any, pipeline: Pipeline, tmp_path: Path
) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["bundle", "bundle_t2i"]
    assert client.models.retrieve("bundle_t2i").id == "bundle_t2i"
    response = client.images.generate(
        prompt="3", n=2, size="16x16", extra_body={"seed": 7, "guidance": 1.5, "steps": 2}
    )
    expected = pipeline.generate([3, 3], [7, 8], guidance=1.5, steps="2")
    assert response.data is not None
    for i, picture in enumerate(response.data):
        file = tmp_path / f"{i}.png"
        file.write_bytes(base64.b64decode(picture.b64_json or ""))
        assert (pixels_of(picture.b64_json or "") == expected.images[i]).all()
        settings = read_metadata(file)
        assert (settings.label, settings.seed) == (3, 7 + i)
        assert settings.sampling == expected.settings[i].sampling
    with pytest.raises(openai.BadRequestError, match="no class of that name"):
        client.images.generate(prompt="no such thing")
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.images.generate(prompt="3", model="dall-e-3")


def test_a_model_of_text_takes_prompts(client: httpx.Client, tiny: Any) -> None:
    body = {"model": "bundle_t2i", "prompt": "a red apple", "negative": "a cat", "seed": 1, "steps": 2}
    response = client.post(GENERATE, json=body).json()
    with Pipeline.from_bundle(tiny.t2i_bundle, "onnxruntime", options=EngineOptions(threads=1)) as pipeline:
        expected = pipeline.generate(["a red apple"], [1], negative="a cat", steps="2").images[0]
    assert (pixels_of(response["data"][0]["b64_json"]) == expected).all()
    assert response["model"] == "bundle_t2i"


def test_a_seed_gives_the_same_picture_at_any_load(client: httpx.Client, address: str) -> None:
    bodies = [{"label": i % 10, "seed": i, "steps": 2, "guidance": 1.5 + i % 3} for i in range(24)]
    alone = [client.post(GENERATE, json=body).json()["data"][0]["b64_json"] for body in bodies]
    in_batches: dict[int, str] = {}

    def ask(i: int) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            in_batches[i] = client.post(GENERATE, json=bodies[i]).json()["data"][0]["b64_json"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sizes = {
        json.loads(Image.open(io.BytesIO(base64.b64decode(f))).info["far-deploy"])["batch"] for f in in_batches.values()
    }
    assert max(sizes) > 1  # they did run together
    for i, file in enumerate(alone):
        difference = pixels_of(file).astype(int) - pixels_of(in_batches[i])
        assert abs(difference).max() <= 1  # the engine's rounding


def test_the_stream_sends_every_level_and_then_the_same_picture(client: httpx.Client, pipeline: Pipeline) -> None:
    body = {"label": 2, "seed": 5, "n": 2, "steps": 2, "levels": [0, 1, 3]}
    response = client.post(STREAM, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert [name for name, _ in events] == ["level"] * 6 + ["picture"] * 2 + ["done"]
    expected = pipeline.generate([2, 2], [5, 6], steps="2", levels=[0, 1, 3], save_levels=True)
    assert expected.level_images is not None
    for _, level in events[:6]:
        assert (level["steps"], level["name"]) == (3, f"level {[0, 1, 3][level['step']]}")
        assert (pixels_of(level["b64_json"]) == expected.level_images[level["index"], level["step"]]).all()
    for i in range(2):
        assert (pixels_of(events[6 + i][1]["b64_json"]) == expected.images[i]).all()
        assert events[6 + i][1]["seed"] == 5 + i
    done = events[-1][1]
    assert {"transformer", "denoise", "decode"} <= done["stages"].keys()
    assert 0 < sum(done["stages"].values()) <= done["drawing"]


def test_openais_client_streams_a_picture_as_it_sharpens(
    client: httpx.Client, address: str, pipeline: Pipeline
) -> None:
    body: dict[str, Any] = {"seed": 5, "steps": 2, "levels": [0, 1, 2, 3]}
    expected = pipeline.generate([2], [5], steps="2", levels=[0, 1, 2, 3], save_levels=True)
    assert expected.level_images is not None
    images = openai.OpenAI(base_url=f"{address}/v1", api_key="none").images
    events = list(images.generate(prompt="2", stream=True, partial_images=2, size="16x16", extra_body=body))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    for event, step in zip(events, (0, 1, 3), strict=True):
        assert (pixels_of(event.b64_json) == expected.level_images[0, step]).all()
        assert (event.size, event.output_format, event.quality) == ("16x16", "png", "auto")
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    (only,) = images.generate(prompt="2", stream=True, extra_body=body)
    assert (pixels_of(only.b64_json) == expected.images[0]).all()
    with pytest.raises(openai.BadRequestError, match="n 2: a stream of this route has one picture"):
        images.generate(prompt="2", n=2, stream=True)
    assert "send stream true" in error_of(client.post(GENERATE, json={"label": 0, "partial_images": 1}))["message"]


@pytest.mark.parametrize(("steps", "count"), [(1, 3), (2, 3), (4, 2), (8, 1), (8, 3), (10, 3), (64, 3)])
def test_partial_images_are_spread_over_the_steps_before_the_last(steps: int, count: int) -> None:
    chosen = sorted(partial_image_steps(steps, count))
    assert len(chosen) == min(count, steps - 1)
    assert all(0 <= step < steps - 1 for step in chosen)
    gaps = np.diff([-1, *chosen, steps - 1])
    assert max(gaps) - min(gaps) <= 1


def test_a_stream_of_openais_ends_with_the_error(serve: Any, tiny: Any) -> None:
    with serve(tiny.bundle, limits=Limits(deadline=1e-6)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        with pytest.raises(openai.APIError, match="not drawn within"):
            list(client.images.generate(prompt="2", stream=True, partial_images=1))
        assert 'far_rejections_total{reason="deadline"} 1.0' in httpx.get(f"{address}/metrics").text


def test_without_a_seed_pictures_differ_and_tell_theirs(client: httpx.Client) -> None:
    seeds = {client.post(GENERATE, json={"label": 0, "steps": 1}).json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert max(seeds) < 2**53


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_pictures_come_in_the_format_that_is_asked_for(client: httpx.Client, kind: str) -> None:
    response = client.post(GENERATE, json={"label": 0, "steps": 1, "seed": 0, "output_format": kind}).json()
    assert Image.open(io.BytesIO(base64.b64decode(response["data"][0]["b64_json"]))).format == kind.upper()


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, None, "neither prompt nor label"),
        ({"label": 10}, None, "classes 0 to 9"),
        ({"label": 0, "n": 0}, "n", "greater than or equal to 1"),
        ({"label": 0, "n": 9}, None, "up to 8"),
        ({"label": 0, "size": "1024x1024"}, None, "16x16"),
        ({"label": 0, "seed": -1}, "seed", "greater than"),
        ({"label": 0, "seed": 2**64}, "seed", "less than"),
        ({"label": 0, "seed": 2**64 - 1, "n": 2}, None, "last seed"),
        ({"label": 0, "guidance": "nan"}, "guidance", "valid number"),
        ({"label": 0, "guidance": 1e400}, "guidance", "finite"),
        ({"label": 0, "steps": 1.5}, "steps", "valid integer"),
        ({"label": 0, "steps": 0}, None, "steps"),
        ({"label": 0, "steps": "1:2:3"}, None, "steps"),
        ({"label": 0, "levels": [3, 1]}, None, "levels"),
        ({"label": 0, "preset": "best"}, None, "preset"),
        ({"label": 0, "top_k": 5}, None, "top_k"),
        ({"label": 0, "quality": "hd"}, "quality", "not permitted"),
        ({"label": 0, "response_format": "url"}, "response_format", "b64_json"),
        ({"label": 0, "negative": "blue"}, None, "leave it out"),
        ({"prompt": "x" * 501}, None, "500"),
        ({"prompt": "x" * 1001}, "prompt", "1000"),
        ({"model": "bundle_t2i"}, None, "no prompt"),
        ({"model": "bundle_t2i", "label": 1}, None, "draws from text"),
        ([], "", "object"),
    ],
)
def test_a_request_that_cannot_be_says_what_is_expected(
    client: httpx.Client, body: Any, field: str | None, message: str
) -> None:
    for route in (GENERATE, STREAM):
        response = client.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
        assert response.status_code == 400
        error = error_of(response)
        assert message in error["message"]
        assert "--" not in error["message"]  # options are for the command line
        assert error["param"] == (field or None)


def test_what_is_no_json_or_no_route_is_an_error_of_the_same_form(client: httpx.Client) -> None:
    responses = [
        client.post(GENERATE, content="{", headers={"content-type": "application/json"}),
        client.post(GENERATE, content=b"\xff\xfe", headers={"content-type": "application/json"}),
        client.post(GENERATE, content=json.dumps({"label": 0})),
        client.get("/v2/nothing"),
        client.get(GENERATE),
        client.get("/v1/models/none"),
    ]
    assert [response.status_code for response in responses] == [400, 400, 400, 404, 405, 404]
    assert all(error_of(response)["type"] == "invalid_request_error" for response in responses)
    assert all(error_of(response)["param"] is None for response in responses)


def test_the_openapi_document_says_what_is_so(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert "422" not in document["paths"][GENERATE]["post"]["responses"]
    assert document["paths"][GENERATE]["post"]["responses"].keys() >= {"200", "400", "401", "413", "429", "503", "504"}
    assert "security" not in document["paths"][GENERATE]["post"]
    assert "guidance" in document["components"]["schemas"]["ImageRequest"]["properties"]
    events = document["paths"][STREAM]["post"]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"][
        "oneOf"
    ]
    assert [event["properties"]["event"]["const"] for event in events] == ["level", "picture", "done", "error"]
    schemas = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert {"Level", "Image", "Timings", "ErrorBody", "PartialImage", "Completed"} <= schemas
    assert schemas <= document["components"]["schemas"].keys()


def test_metrics_and_health(client: httpx.Client) -> None:
    client.post(GENERATE, json={"label": 0, "steps": 1})
    assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}
    text = client.get("/metrics").text
    for line in (
        'far_stage_seconds_count{model="bundle",stage="denoise"}',
        'far_batch_size_count{model="bundle"}',
        'far_queue_length{model="bundle_t2i"} 0.0',
        'far_request_seconds_count{route="/v1/images/generations",status="200"}',
    ):
        assert line in text


def test_keys_are_asked_for_and_each_has_its_rate(serve: Any, tiny: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# comment\nfirst-key-of-sixteen\nsecond-key-of-sixteen\n")
    now = [0.0]
    with (
        serve(tiny.bundle, keys=ApiKeys.read(keys), rate_limiter=RateLimiter(3, lambda: now[0])) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):

        def ask(key: str, n: int = 1) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return client.post(GENERATE, json={"label": 0, "steps": 1, "n": n}, headers=headers)

        for wrong in ("", "third-key-of-sixteen", "first-key-of-sixtee"):
            assert (response := ask(wrong)).status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
        assert client.get("/v1/models").status_code == 401
        assert client.get("/healthz").status_code == 200
        assert ask("first-key-of-sixteen", 3).status_code == 200
        refused = ask("first-key-of-sixteen")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "20")
        assert ask("second-key-of-sixteen", 2).status_code == 200
        now[0] = 20.0
        assert ask("first-key-of-sixteen").status_code == 200
        assert ask("first-key-of-sixteen", 4).status_code == 400  # never
        assert 'far_rejections_total{reason="key"} 4.0' in client.get("/metrics").text
        assert 'rejections_total{reason="rate"} 1.0' in client.get("/metrics").text
        assert "security" in client.get("/openapi.json").json()["paths"][GENERATE]["post"]


def hold(gate: threading.Event) -> Any:
    """Lets the engine of a model wait at every stage until the gate is open."""

    def prepare(model: Model) -> None:
        engine = model.batcher.pipeline.engine
        run = engine.run

        def waiting(stage: str, *arguments: Any, **keywords: Any) -> Any:
            assert gate.wait(30)
            return run(stage, *arguments, **keywords)

        engine.run = waiting  # type: ignore[method-assign]

    return prepare


def in_background(address: str, count: int, **fields: Any) -> tuple[list[threading.Thread], list[httpx.Response]]:
    responses: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            responses.append(client.post(GENERATE, json={"label": 0, "steps": 1, **fields}))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, responses


def wait_for_length(client: httpx.Client, count: int) -> None:
    until = time.monotonic() + 30
    while f'far_queue_length{{model="bundle"}} {count}.0' not in client.get("/metrics").text:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_full_queue_says_when_to_come_again_and_a_late_picture_is_given_up(serve: Any, tiny: Any) -> None:
    gate, queue = threading.Event(), QueueConfig(max_batch=1, max_queue=2)
    with (
        serve(tiny.bundle, queue=queue, limits=Limits(deadline=3), prepare=hold(gate)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        threads, responses = in_background(address, 1)
        wait_for_length(client, 0)
        time.sleep(0.2)
        more, others = in_background(address, 2)
        wait_for_length(client, 2)
        refused = client.post(GENERATE, json={"label": 0})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert error_of(refused)["code"] == "queue_full"
        for thread in (*threads, *more):
            thread.join()
        assert [response.status_code for response in (*responses, *others)] == [504] * 3
        gate.set()
        assert client.post(GENERATE, json={"label": 0, "steps": 1}).status_code == 200


def test_a_client_that_leaves_frees_its_place(serve: Any, tiny: Any) -> None:
    gate, queue = threading.Event(), QueueConfig(max_batch=1, max_queue=1)
    with (
        serve(tiny.bundle, queue=queue, prepare=hold(gate)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        threads, responses = in_background(address, 1)
        time.sleep(0.5)
        for route in (GENERATE, STREAM):
            with pytest.raises(httpx.TimeoutException):
                client.post(route, json={"label": 0}, timeout=0.5)
            until = time.monotonic() + 30  # the place is free again
            while client.post(GENERATE, json={"label": 99}).status_code == 429:
                assert time.monotonic() < until
            wait_for_room(client)
        gate.set()
        threads[0].join()
        assert responses[0].status_code == 200


def wait_for_room(client: httpx.Client) -> None:
    """Wait until a picture is accepted, and give it up at once."""
    until = time.monotonic() + 30
    while True:
        try:
            response = client.post(GENERATE, json={"label": 0}, timeout=0.5)
        except httpx.TimeoutException:
            return
        assert response.status_code == 429
        assert time.monotonic() < until


def test_an_engine_that_fails_is_told_without_its_insides_and_the_next_request_is_drawn(serve: Any, tiny: Any) -> None:
    broken = [True]

    def prepare(model: Model) -> None:
        engine = model.batcher.pipeline.engine
        run = engine.run

        def failing(stage: str, *arguments: Any, **keywords: Any) -> Any:
            if broken[0]:
                raise RuntimeError("secret of the engine")
            return run(stage, *arguments, **keywords)

        engine.run = failing  # type: ignore[method-assign]

    with serve(tiny.bundle, prepare=prepare) as address, httpx.Client(base_url=address, timeout=60) as client:
        response = client.post(GENERATE, json={"label": 0})
        assert response.status_code == 500
        assert "secret" not in response.text
        assert error_of(response)["code"] == "internal_error"
        events = events_of(client.post(STREAM, json={"label": 0}).text)
        assert [name for name, _ in events] == ["error"]
        assert "secret" not in json.dumps(events)
        broken[0] = False
        assert client.post(GENERATE, json={"label": 0, "steps": 1}).status_code == 200


def test_large_slow_and_half_sent_bodies_are_refused(serve: Any, tiny: Any) -> None:
    limits = Limits(max_body=1000, body_timeout=0.5)
    with serve(tiny.bundle, limits=limits) as address, httpx.Client(base_url=address, timeout=60) as client:
        large = client.post(GENERATE, content=b" " * 1001)
        assert (large.status_code, error_of(large)["code"]) == (413, "large_body")
        parts = client.post(GENERATE, content=iter([b" " * 600] * 3))
        assert parts.status_code == 413
        host, port = address.removeprefix("http://").split(":")
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
        with socket.create_connection((host, int(port))) as half:
            half.sendall(head.encode() + b'{"label"')
            assert b" 408 " in half.recv(4096)
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(head.encode() + b'{"label"')
        assert client.post(GENERATE, json={"label": 0, "steps": 1}).status_code == 200


def test_a_name_that_is_not_the_servers_is_refused(serve: Any, tiny: Any) -> None:
    with (
        serve(tiny.bundle, hosts=frozenset({"127.0.0.1", "::1"})) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        assert client.get("/healthz").status_code == 200
        assert client.get("/healthz", headers={"host": "[::1]:80"}).status_code == 200
        assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 421
        assert "access-control-allow-origin" not in client.get("/healthz", headers={"origin": "http://x"}).headers
