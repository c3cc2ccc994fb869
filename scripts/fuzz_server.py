"""Malformed requests against `far serve`, made by Schemathesis from the server's own OpenAPI document.

    python scripts/fuzz_server.py BUNDLE [--requests 10000] [--seed 0] [--json FILE] [-- OPTIONS OF far serve]

Three requests of four break the document's rules (kinds, bounds, missing and unknown fields), one keeps them. Every
answer has to be one that the document describes, in status, content type, headers and body; none may be a fault of the
server (5xx, or such an event in a stream); what breaks the rules may not be drawn. At the end the server has to be
alive, draw a picture, and hold no more memory than a third above what it held once it was warm. A small BUNDLE lets
the valid requests cost little. Exits with 1 where anything of that fails. Only a server that it starts itself, on this
machine, is a target; the same seed asks the same.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import HypothesisException
from pydantic import BaseModel
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import Failure, FailureGroup

from far_runtime.errors import FarError
from far_runtime.files import check_file, whole_file
from far_runtime.serve.schema import ErrorBody, Image, Level, Timings
from serve_process import Seen, serving

CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
BROKEN, RIGHT = schemathesis.GenerationMode.NEGATIVE, schemathesis.GenerationMode.POSITIVE
MODES = (BROKEN, RIGHT, BROKEN, BROKEN)
EVENTS: dict[str, type[BaseModel]] = {"level": Level, "picture": Image, "done": Timings, "error": ErrorBody}
ROUND = 50
"""Requests of one route and mode in a row, each such round with a seed of its own."""
WAIT = 120.0
GROWTH = 4 / 3


@dataclass
class Found:
    """What came of the requests: by route, by mode and status; failures by what was wrong, with how often and the
    first request that shows it; seconds of the slowest; resident bytes when warm and at the end."""

    seed: int
    statuses: dict[str, collections.Counter[str]] = field(default_factory=dict)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    slowest: float = 0.0
    seconds: float = 0.0
    memory: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(sum(of.values()) for of in self.statuses.values())

    def fail(self, what: str, request: str) -> None:
        count, first = self.failures.get(what, (0, request))
        self.failures[what] = count + 1, first


def fuzz(address: str, count: int, seed: int) -> Found:
    """Send `count` requests to the server at an address."""
    config = schemathesis.Config(seed=seed)
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json", config=config, timeout=WAIT)
    load_all_checks()
    operations = [one for result in schema.get_all_operations() if (one := result.ok()) is not None]
    varied = [one for one in operations if one.body or one.path_parameters or one.query]
    found, session = Found(seed), requests.Session()
    session.trust_env = False
    started = time.perf_counter()
    for one in operations:
        if one not in varied:
            send(one, RIGHT, address, session, found, 1, seed)
    turn, warm = 0, False
    while found.requests < count:
        before = found.requests
        for one in varied:
            mode = MODES[turn % len(MODES)]
            size = min(ROUND if one.body else ROUND // 10, count - found.requests)
            if size > 0:
                send(one, mode, address, session, found, size, seed + turn)
        turn += 1
        if found.requests == before:
            raise FarError("the OpenAPI document gives no more requests; see its paths")
        if not warm and found.requests >= count / 10:
            warm = True
            found.memory.append(seen(address).memory)
    found.memory.append(seen(address).memory)
    found.seconds = time.perf_counter() - started
    return found


def send(
    operation: Any, mode: Any, address: str, session: requests.Session, found: Found, count: int, seed: int
) -> None:
    """`count` requests of a route and a mode."""
    checks = [check for check in CHECKS.get_all() if check.__name__ in CHECKED]
    statuses = found.statuses.setdefault(f"{operation.method.upper()} {operation.path}", collections.Counter())

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        began = time.perf_counter()
        try:
            answer = case.call(base_url=address, session=session, timeout=WAIT)
        except requests.RequestException as error:
            statuses[type(error).__name__] += 1
            found.fail(f"no answer: {type(error).__name__}", case.as_curl_command(base_url=address))
            return
        found.slowest = max(found.slowest, time.perf_counter() - began)
        statuses[f"{mode.value} {answer.status_code}"] += 1
        for what in wrong(case, answer, checks):
            found.fail(what, case.as_curl_command(base_url=address))

    try:
        one()
    except HypothesisException as error:  # no request of this mode can be made
        statuses[f"{mode.value}: {type(error).__name__}"] += 0


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
    if last not in ("done", "error"):
        raise ValueError(f"its last event is {last}")
    return found


def seen(address: str) -> Seen:
    """The server at this moment."""
    return Seen.read(requests.get(f"{address}/metrics", timeout=WAIT).text)


def check_end(address: str, found: Found) -> None:
    """Put down what is wrong with the server when all is over."""
    for route in ("/healthz", "/readyz"):
        if (status := requests.get(f"{address}{route}", timeout=WAIT).status_code) != 200:
            found.fail(f"{route} answers {status} at the end", "")
    model = requests.get(f"{address}/v1/models", timeout=WAIT).json()["data"][0]["far"]
    asked = {"prompt": "a red apple"} if model["condition"] == "text" else {"label": 0}
    if (status := requests.post(f"{address}/v1/images/generations", json=asked, timeout=WAIT).status_code) != 200:
        found.fail(f"a plain request is answered with {status} at the end", "")
    warm, end = found.memory
    if end > warm * GROWTH:
        found.fail(f"memory grew from {warm / 1e6:.0f} to {end / 1e6:.0f} MB", "")


def show(found: Found) -> None:
    """The report."""
    for route, statuses in found.statuses.items():
        told = ", ".join(f"{name}: {count}" for name, count in sorted(statuses.items()) if count)
        click.echo(f"{route:34} {sum(statuses.values()):6}   {told}")
    warm, end = (f"{memory / 1e6:.0f}" for memory in found.memory)
    click.echo(
        f"{found.requests} requests (seed {found.seed}) in {found.seconds:.0f} s, the slowest {found.slowest:.2f} s; "
        f"memory {warm} MB after a tenth of them, {end} MB at the end"
    )
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
            found = fuzz(address, count, seed)
            check_end(address, found)
        show(found)
        if report:
            with whole_file(report) as aside:
                aside.write_text(json.dumps(dataclasses.asdict(found), indent=2))
    except FarError as error:
        raise SystemExit(f"error: {error}") from error
    sys.exit(1 if found.failures else 0)


if __name__ == "__main__":
    main()
