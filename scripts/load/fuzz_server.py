"""Malformed requests against `far serve`, made by Schemathesis from the server's own OpenAPI document.

    python scripts/load/fuzz_server.py BUNDLE [--requests 10000] [--seed 0] [--json FILE] [-- OPTIONS OF far serve]

Half of the requests break the document's rules (kinds, bounds, missing and unknown fields), a quarter keeps them, and
another asks besides for what is there, so that much of it is drawn. Every answer has to be one that the document
describes, in status, content type, headers and body; none may be a fault of the server (5xx, or such an event in a
stream); what breaks the rules may not be drawn. At the end the server has to be alive, draw a picture, and hold at
most a third more memory than after a tenth of the requests; few --requests are too few to judge memory by, which is
said then. No route may be left without a request. A small BUNDLE lets those that are drawn cost little.
Exits with 1 where anything of that fails. Only a server that it starts itself, on this machine, is a target; the same
seed asks the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import hypothesis
import PIL.Image
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import HypothesisException, Unsatisfiable
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.core.result import Ok

from far_runtime.errors import FarError
from far_runtime.sampling.options import SAMPLING
from far_runtime.serve.events import STREAM_EVENTS, openai_events
from far_runtime.serve.schema import ErrorBody
from far_runtime.storage.atomic import check_file, whole_file
from serve_process import Seen, serving

CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
BROKEN, RIGHT, LIKELY = "broken", "right", "likely"
"""LIKELY: right, and about what is there: the served model, a class of it, settings that its system has."""
MODES = (BROKEN, RIGHT, BROKEN, LIKELY)
EVENTS = {**STREAM_EVENTS, **openai_events("image_generation"), **openai_events("image_edit")}
LAST = ("done", "error", "image_generation.completed", "image_edit.completed")
ROW = 20
"""Requests of one route and mode in a row, each such row with a seed of its own."""
WAIT = 120.0
MOST_EVENTS = 10_000
GROWTH, TENTHS = 4 / 3, 10
MOST = 8
"""Pictures of a request, unless `far serve --max-n` says otherwise."""


@dataclass
class Found:
    """What came of the requests: by route, by mode and status; failures by what was wrong, with how often and the
    first request that shows it; seconds of the slowest; resident bytes after every tenth. unjudged: why memory was not
    judged, "" where it was."""

    seed: int
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    slowest: float = 0.0
    seconds: float = 0.0
    memory: list[float] = field(default_factory=list)
    unjudged: str = ""

    @property
    def requests(self) -> int:
        return sum(sum(of.values()) for of in self.statuses.values())

    def fail(self, what: str, request: str) -> None:
        count, first = self.failures.get(what, (0, request))
        self.failures[what] = count + 1, first


def fuzz(address: str, count: int, seed: int, about: Mapping[str, Any] | None = None, row: int = ROW) -> Found:
    """Send `count` requests to the server at an address. about: what /v1/models says of its model; without it, none are
    LIKELY."""
    config = schemathesis.Config.from_dict({"seed": seed, "max-stream-events": MOST_EVENTS})
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", config=config, timeout=WAIT)
    load_all_checks()
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    varied = [one for one in operations if one.body or one.path_parameters or one.query]
    found, session = Found(seed, {route_of(one): {} for one in operations}), requests.Session()
    session.trust_env = False
    started, turn = time.perf_counter(), 0
    for one in operations:
        if one not in varied:
            send(one, RIGHT, address, session, found, 1, seed)
    while found.requests < count:
        before, mode = found.requests, MODES[turn % len(MODES)]
        for one in varied:
            size = min(row if one.body else row // 10, count - found.requests)
            if size > 0:
                send(one, mode, address, session, found, size, seed + turn, about if mode == LIKELY else None)
        turn += 1
        if found.requests == before:
            raise FarError("the OpenAPI document gives no more requests; see its paths")
        if found.requests * TENTHS >= count * (len(found.memory) + 1):
            # A server that is gone is among the failures already.
            with contextlib.suppress(requests.RequestException):
                found.memory.append(seen(address).memory)
    found.seconds = time.perf_counter() - started
    for route, statuses in found.statuses.items():
        if not statuses:
            found.fail(f"no request of {route} was sent: none could be made, or --requests is too small", "")
    return found


def route_of(operation: Any) -> str:
    """What the report calls an operation of the document."""
    return f"{operation.method.upper()} {operation.path}"


def send(
    operation: Any, mode: str, address: str, session: requests.Session, found: Found, count: int, seed: int,
    about: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """`count` requests of a route and a mode."""
    checks = [check for check in CHECKS.get_all() if check.__name__ in CHECKED]
    statuses = found.statuses.setdefault(route_of(operation), {})
    kind = schemathesis.GenerationMode.NEGATIVE if mode == BROKEN else schemathesis.GenerationMode.POSITIVE

    def put_down(what: str) -> None:
        statuses[f"{mode} {what}"] = statuses.get(f"{mode} {what}", 0) + 1

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @hypothesis.given(operation.as_strategy(generation_mode=kind))
    def one(case: Any) -> None:
        if about and isinstance(case.body, dict):
            make_likely(case.body, about)
        began = time.perf_counter()
        try:
            answer = case.call(base_url=address, session=session, timeout=WAIT)
        except requests.RequestException as error:
            put_down(type(error).__name__)
            found.fail(f"no answer: {type(error).__name__}", case.as_curl_command(base_url=address))
            return
        found.slowest = max(found.slowest, time.perf_counter() - began)
        put_down(str(answer.status_code))
        for what in wrong(case, answer, checks):
            found.fail(what, case.as_curl_command(base_url=address))

    try:
        one()
    except HypothesisException as error:
        # A route whose every request is right has none that is BROKEN.
        if mode != BROKEN or not isinstance(error, Unsatisfiable):
            found.fail(f"{route_of(operation)}: making {mode} requests: {type(error).__name__}", "")


def make_likely(body: dict[str, Any], about: Mapping[str, Any]) -> None:
    """Let a right request be about what is there, in place of words by lot; numbers stay as they are."""
    names = {"model", "prompt", "label", "negative", "size", "mask", "outpaint"}
    words = {name for name in SAMPLING if isinstance(body.get(name), str | list)}
    others = {name for name in SAMPLING if name not in about["options"]}
    for name in names | words | others:
        body.pop(name, None)
    if about["condition"] == "text":
        body["prompt"] = "a red apple"
    else:
        body["label"] = 0
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], MOST)
    if "image" in body:
        file = io.BytesIO()
        PIL.Image.new("RGBA", (24, 16)).save(file, "png")  # all of it transparent
        body["image"] = file.getvalue()


def wrong(case: Any, answer: Any, checks: list[Any]) -> list[str]:
    """What an answer does against the document."""
    said = []
    try:
        case.validate_response(answer, checks=checks)
    except FailureGroup as group:
        said += [f"{error.title}: {error.message.strip().partition(chr(10))[0]}" for error in group.exceptions]
    except Failure as error:
        said.append(f"{error.title}: {error.message.strip().partition(chr(10))[0]}")
    if answer.status_code == 200 and answer.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        try:
            said += [f"an event of the stream: {error}" for error in stream_errors(answer.text)]
        except ValueError as error:
            said.append(f"a stream that is none: {error}")
    return said


def stream_errors(text: str) -> list[str]:
    """Codes of the server's own errors in a stream of events; ValueError where it is not as the document says."""
    found, last = [], ""
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, _, data = block.partition("\n")
        last = name.removeprefix("event: ")
        if last not in EVENTS:
            raise ValueError(f"event {last!r:.40}")
        event = EVENTS[last].model_validate_json(data.removeprefix("data: "))
        if isinstance(event, ErrorBody) and event.error.type == "server_error":
            found.append(str(event.error.code))
    if last not in LAST:
        raise ValueError(f"its last event is {last}")
    return found


def seen(address: str) -> Seen:
    """The server at this moment."""
    answer = requests.get(f"{address}/metrics", timeout=WAIT)
    answer.raise_for_status()
    return Seen.read(answer.text)


def check_end(address: str, found: Found, about: Mapping[str, Any]) -> None:
    """Put down what is wrong with the server when all is over."""
    asked: dict[str, Any] = {}
    make_likely(asked, about)
    try:
        for route in ("/healthz", "/readyz"):
            if (status := requests.get(f"{address}{route}", timeout=WAIT).status_code) != 200:
                found.fail(f"{route} answers {status} at the end", "")
        if (status := requests.post(f"{address}/v1/images/generations", json=asked, timeout=WAIT).status_code) != 200:
            found.fail(f"a plain request is answered with {status} at the end", "")
    except requests.RequestException as error:
        found.fail(f"the server does not answer at the end: {type(error).__name__}", "")
    judge_memory(found)


def judge_memory(found: Found) -> None:
    """Put down memory that grew, or why that cannot be told."""
    if len(found.memory) < 2:
        found.unjudged = f"looked at {len(found.memory)} times; give more --requests"
        return
    warm, end = found.memory[0], found.memory[-1]
    if not warm:
        found.unjudged = "the server does not tell it on this system"
    elif end > warm * GROWTH:
        found.fail(f"memory grew from {warm / 1e6:.0f} to {end / 1e6:.0f} MB", "")


def show(found: Found) -> None:
    """The report."""
    for route, statuses in found.statuses.items():
        told = ", ".join(f"{name}: {count}" for name, count in sorted(statuses.items()) if count)
        click.echo(f"{route:34} {sum(statuses.values()):6}   {told}")
    memory = " ".join(f"{size / 1e6:.0f}" for size in found.memory)
    click.echo(
        f"{found.requests} requests (seed {found.seed}) in {found.seconds:.0f} s, the slowest {found.slowest:.2f} s; "
        f"memory after every tenth {memory} MB"
    )
    if found.unjudged:
        click.echo(f"memory was not judged: {found.unjudged}")
    for what, (count, request) in found.failures.items():
        click.echo(f"FAILED {count} times: {what[:300]}\n    {request[:600]}")
    click.echo(f"{len(found.failures)} kinds of failures" if found.failures else "no failures")


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--requests", "count", type=click.IntRange(min=20), default=10_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "report", type=click.Path(path_type=Path), help="Where to put the numbers.")
def main(bundle: Path, options: tuple[str, ...], count: int, seed: int, report: Path | None) -> None:
    try:
        if report:
            check_file(report, "--json")
        with serving(bundle, options) as address:
            about = requests.get(f"{address}/v1/models", timeout=WAIT).json()["data"][0]["far"]
            found = fuzz(address, count, seed, about)
            check_end(address, found, about)
            # Before the server is ended, which may raise.
            show(found)
            if report:
                with whole_file(report) as aside:
                    aside.write_text(json.dumps(dataclasses.asdict(found), indent=2))
    except FarError as error:
        raise SystemExit(f"error: {error}") from error
    sys.exit(1 if found.failures else 0)


if __name__ == "__main__":
    main()
