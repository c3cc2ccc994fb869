"""Malformed requests to `far serve`, made by Schemathesis from the server's own OpenAPI document.

    python scripts/load/fuzz_server.py BUNDLE [--requests 10000] [--seed 0] [--json FILE] [-- OPTIONS OF far serve]

Half of the requests violate the document (types, bounds, missing and unknown fields). A quarter conforms to it. The
last quarter also asks for what the server has, so that many of these requests are drawn. Every response has to be one
that the document describes, in status, content type, headers and body. None may be a failure of the server (5xx, or
such an event in a stream), and requests that violate the document may not be drawn. Every route has to get a request.
At the end the server has to be alive, draw a picture, and hold at most a third more memory than after a tenth of the
requests; with few --requests memory cannot be judged, and the report says so. A small BUNDLE keeps the test short.

The exit code is 1 if anything of this fails. The script starts the server itself, on this machine, and tests no other
one. The same seed sends the same requests.
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

from far_runtime.cli.option_names import with_options
from far_runtime.errors import FarError
from far_runtime.sampling.options import SETTINGS
from far_runtime.serve.events import STREAM_EVENTS, openai_events
from far_runtime.serve.schema import ErrorBody
from far_runtime.storage.atomic import check_file, whole_file
from serve_process import ServerStats, serving

CHECK_NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
BROKEN, RIGHT, LIKELY = "broken", "right", "likely"
"""Modes of requests: BROKEN ones violate the document, RIGHT ones conform to it, LIKELY ones also ask for what the
server
has: its model, one of its classes, settings of its system."""
MODES = (BROKEN, RIGHT, BROKEN, LIKELY)
EVENTS = {**STREAM_EVENTS, **openai_events("image_generation"), **openai_events("image_edit")}
LAST_EVENTS = ("done", "error", "image_generation.completed", "image_edit.completed")
SERIES = 20
"""Requests of the same route and mode that share a seed, sent one after the other."""
TIMEOUT = 120.0
MAX_EVENTS = 10_000
MAX_GROWTH, PARTS = 4 / 3, 10
MAX_PICTURES = 8
"""Of a LIKELY request: the default of `far serve --max-n`."""


@dataclass
class FuzzReport:
    """What became of the requests."""

    seed: int
    """Seed of the requests."""

    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of requests by route, and by mode and status."""

    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By what was wrong: how often, and the first request that shows it."""

    slowest: float = 0.0
    """Seconds of the slowest request."""

    seconds: float = 0.0
    """Seconds of all requests."""

    memory: list[float] = field(default_factory=list)
    """Resident bytes of the server after every tenth of the requests."""

    unjudged: str = ""
    """Why memory could not be judged; "" if it was."""

    @property
    def requests(self) -> int:
        return sum(sum(counts.values()) for counts in self.statuses.values())

    def count(self, route: str, mode: str, status: str) -> None:
        """Count a request."""
        counts = self.statuses.setdefault(route, {})
        counts[f"{mode} {status}"] = counts.get(f"{mode} {status}", 0) + 1

    def fail(self, failure: str, request: str = "") -> None:
        """Record a failure, and the request that shows it."""
        count, first_request = self.failures.get(failure, (0, request))
        self.failures[failure] = count + 1, first_request


@dataclass(frozen=True)
class Target:
    """A server to send requests to."""

    address: str
    """Its URL."""

    model: Mapping[str, Any] | None = None
    """Its model, as /v1/models describes it; without it, LIKELY requests are RIGHT ones."""

    session: requests.Session = field(default_factory=requests.Session)
    """The connections to it."""


def fuzz(target: Target, count: int, seed: int, series: int = SERIES) -> FuzzReport:
    """Send `count` requests to a server."""
    config = schemathesis.Config.from_dict({"seed": seed, "max-stream-events": MAX_EVENTS})
    schema = schemathesis.openapi.from_url(f"{target.address}/openapi.json", config=config, timeout=TIMEOUT)
    load_all_checks()
    target.session.trust_env = False
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    report = FuzzReport(seed, {route_of(operation): {} for operation in operations})
    started, turn = time.perf_counter(), 0
    varied = []
    for operation in operations:
        if operation.body or operation.path_parameters or operation.query:
            varied.append(operation)
        else:
            send(operation, RIGHT, target, report, 1, seed)
    while report.requests < count:
        before, mode = report.requests, MODES[turn % len(MODES)]
        for operation in varied:
            size = min(series if operation.body else series // 10, count - report.requests)
            if size > 0:
                send(operation, mode, target, report, size, seed + turn)
        turn += 1
        if report.requests == before:
            raise FarError("the OpenAPI document gives no more requests; see its paths")
        if report.requests * PARTS >= count * (len(report.memory) + 1):
            # That a server is gone is among the failures already.
            with contextlib.suppress(requests.RequestException):
                report.memory.append(read_stats(target.address).memory)
    report.seconds = time.perf_counter() - started
    for route, statuses in report.statuses.items():
        if not statuses:
            report.fail(f"no request of {route} was sent: none could be made, or --requests is too small")
    return report


def route_of(operation: Any) -> str:
    """The name of an operation of the document in the report."""
    return f"{operation.method.upper()} {operation.path}"


def send(operation: Any, mode: str, target: Target, report: FuzzReport, count: int, seed: int) -> None:
    """Send `count` requests of one route and mode, and record what becomes of them."""
    route = route_of(operation)
    checks = [check for check in CHECKS.get_all() if check.__name__ in CHECK_NAMES]
    generation_mode = schemathesis.GenerationMode.NEGATIVE if mode == BROKEN else schemathesis.GenerationMode.POSITIVE

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @hypothesis.given(operation.as_strategy(generation_mode=generation_mode))
    def send_case(case: Any) -> None:
        if mode == LIKELY and target.model and isinstance(case.body, dict):
            make_likely(case.body, target.model)
        started = time.perf_counter()
        try:
            response = case.call(base_url=target.address, session=target.session, timeout=TIMEOUT)
        except requests.RequestException as error:
            report.count(route, mode, type(error).__name__)
            report.fail(f"no answer: {type(error).__name__}", case.as_curl_command(base_url=target.address))
            return
        report.slowest = max(report.slowest, time.perf_counter() - started)
        report.count(route, mode, str(response.status_code))
        for violation in violations(case, response, checks):
            report.fail(violation, case.as_curl_command(base_url=target.address))

    try:
        send_case()
    except HypothesisException as error:
        # A route whose every request conforms has none that is BROKEN.
        if mode != BROKEN or not isinstance(error, Unsatisfiable):
            report.fail(f"{route}: making {mode} requests: {type(error).__name__}")


def make_likely(body: dict[str, Any], model: Mapping[str, Any]) -> None:
    """Let a request ask for what the server has, in place of random words; numbers stay as they are."""
    names = {"model", "prompt", "label", "negative", "size", "mask", "outpaint"}
    words = {name for name in SETTINGS if isinstance(body.get(name), str | list)}
    foreign = {name for name in SETTINGS if name not in model["options"]}
    for name in names | words | foreign:
        body.pop(name, None)
    if model["condition"] == "text":
        body["prompt"] = "a red apple"
    else:
        body["label"] = 0
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], MAX_PICTURES)
    if "image" in body:
        file = io.BytesIO()
        PIL.Image.new("RGBA", (24, 16)).save(file, "png")  # all of it transparent
        body["image"] = file.getvalue()


def violations(case: Any, response: Any, checks: list[Any]) -> list[str]:
    """How a response violates the document."""
    found = []
    try:
        case.validate_response(response, checks=checks)
    except FailureGroup as group:
        found += [f"{error.title}: {error.message.strip().partition(chr(10))[0]}" for error in group.exceptions]
    except Failure as error:
        found.append(f"{error.title}: {error.message.strip().partition(chr(10))[0]}")
    content_type = response.headers.get("content-type", [""])[0]
    if response.status_code == 200 and content_type.startswith("text/event-stream"):
        try:
            found += [f"an event of the stream: {code}" for code in server_errors(response.text)]
        except ValueError as error:
            found.append(f"a malformed stream: {error}")
    return found


def server_errors(text: str) -> list[str]:
    """Codes of the server's failures in a stream of events; raises ValueError if the stream violates the document."""
    codes, name = [], ""
    for block in text.removesuffix("\n\n").split("\n\n"):
        line, _, data = block.partition("\n")
        name = line.removeprefix("event: ")
        if name not in EVENTS:
            raise ValueError(f"event {name!r:.40}")
        event = EVENTS[name].model_validate_json(data.removeprefix("data: "))
        if isinstance(event, ErrorBody) and event.error.type == "server_error":
            codes.append(str(event.error.code))
    if name not in LAST_EVENTS:
        raise ValueError(f"its last event is {name}")
    return codes


def read_stats(address: str) -> ServerStats:
    """The server's statistics now."""
    response = requests.get(f"{address}/metrics", timeout=TIMEOUT)
    response.raise_for_status()
    return ServerStats.parse(response.text)


def check_end(address: str, report: FuzzReport, model: Mapping[str, Any]) -> None:
    """Record what is wrong with the server after all requests."""
    body: dict[str, Any] = {}
    make_likely(body, model)
    try:
        for route in ("/healthz", "/readyz"):
            if (status := requests.get(f"{address}{route}", timeout=TIMEOUT).status_code) != 200:
                report.fail(f"{route} answers {status} at the end")
        if (status := requests.post(f"{address}/v1/images/generations", json=body, timeout=TIMEOUT).status_code) != 200:
            report.fail(f"a plain request is answered with {status} at the end")
    except requests.RequestException as error:
        report.fail(f"the server does not answer at the end: {type(error).__name__}")
    judge_memory(report)


def judge_memory(report: FuzzReport) -> None:
    """Record memory that grew, or why it cannot be judged."""
    if len(report.memory) < 2:
        report.unjudged = f"read {len(report.memory)} times; give more --requests"
        return
    warm, end = report.memory[0], report.memory[-1]
    if not warm:
        report.unjudged = "the server does not tell it on this system"
    elif end > warm * MAX_GROWTH:
        report.fail(f"memory grew from {warm / 1e6:.0f} to {end / 1e6:.0f} MB")


def show(report: FuzzReport) -> None:
    """Print the report."""
    for route, statuses in report.statuses.items():
        counts = ", ".join(f"{name}: {count}" for name, count in sorted(statuses.items()) if count)
        click.echo(f"{route:34} {sum(statuses.values()):6}   {counts}")
    memory = " ".join(f"{size / 1e6:.0f}" for size in report.memory)
    click.echo(
        f"{report.requests} requests (seed {report.seed}) in {report.seconds:.0f} s, "
        f"the slowest {report.slowest:.2f} s; memory after every tenth {memory} MB"
    )
    if report.unjudged:
        click.echo(f"memory was not judged: {report.unjudged}")
    for failure, (count, request) in report.failures.items():
        click.echo(f"FAILED {count} times: {failure[:300]}\n    {request[:600]}")
    click.echo(f"{len(report.failures)} kinds of failures" if report.failures else "no failures")


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--requests", "count", type=click.IntRange(min=20), default=10_000, show_default=True, help="How many to send."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the requests.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write the numbers.")
def main(bundle: Path, options: tuple[str, ...], count: int, seed: int, file: Path | None) -> None:
    try:
        if file:
            check_file(file, "--json")
        with serving(bundle, options) as address:
            model = requests.get(f"{address}/v1/models", timeout=TIMEOUT).json()["data"][0]["far"]
            report = fuzz(Target(address, model), count, seed)
            check_end(address, report, model)
            # Before the server is stopped, which may raise.
            show(report)
            if file:
                with whole_file(file) as aside:
                    aside.write_text(json.dumps(dataclasses.asdict(report), indent=2))
    except FarError as error:
        raise SystemExit(f"error: {with_options(error)}") from error
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
