"""Put load on `far serve` and report how it copes.

\b
    python scripts/load/load_test.py BUNDLE [OPTIONS] [-- OPTIONS OF far serve]   starts a server on a free port
    python scripts/load/load_test.py --url http://127.0.0.1:8000 [OPTIONS]        uses one that runs

In a closed loop, each of --clients sends a request when the one before is answered. In an open loop, with --rate,
requests come at random times, so many a second, and their seconds count from when they were due. The requests (labels,
seeds, numbers of pictures, streams or not) depend on --seed alone. The server's memory is read every second; --minutes
60 makes a soak test. Afterwards some of the pictures are drawn once more, alone: they may differ by 1 of 255.
--compare-batching tests two servers in turn, one with its --max-batch and one with 1. Ctrl-C ends a test early, with a
report. The exit code is 1 if a request failed (other than by a 429), a picture differs, no picture came, or the server
is gone at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import click

from far_runtime.cli.option_names import with_options
from far_runtime.cli.serve import is_loopback
from far_runtime.errors import FarError
from far_runtime.storage.atomic import check_file, whole_file
from report import comparison, machine, report
from run import Plan
from serve_process import serving


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--url", help="A running server, in place of BUNDLE.")
@click.option("--elsewhere", is_flag=True, help="Allow --url to be another machine. Only for servers of your own.")
@click.option("--key", envvar="FAR_KEY", show_envvar=True, default="", help="An API key of the server.")
@click.option("--clients", type=click.IntRange(1, 1000), default=8, show_default=True, help="Clients of a closed loop.")
@click.option("--rate", type=click.FloatRange(0.01, 1000), help="Requests a second of an open loop.")
@click.option(
    "--minutes", type=click.FloatRange(0.01, 1440), default=1.0, show_default=True, help="How long to send requests."
)
@click.option("--requests", "max_requests", type=click.IntRange(1), help="Send at most so many.")
@click.option("--streams", type=click.FloatRange(0, 1), default=0.25, show_default=True, help="Share of streams.")
@click.option(
    "--n",
    "max_pictures",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="Requests have 1 to N pictures.",
)
@click.option("--ask", default="{}", metavar="JSON", help='Further fields of every request, such as {"steps": 4}.')
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the requests.")
@click.option("--check", type=click.IntRange(0), default=8, show_default=True, help="How many pictures to draw again.")
@click.option("--compare-batching", is_flag=True, help="Compare with a second server that draws one by one.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Rounds of that comparison.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write the numbers.")
def load_test(
    bundle: Path | None, options: tuple[str, ...], url: str | None, elsewhere: bool, key: str, clients: int,
    rate: float | None, minutes: float, max_requests: int | None, streams: float, max_pictures: int, ask: str,
    seed: int, check: int, compare_batching: bool, rounds: int, file: Path | None,
) -> None:  # fmt: skip
    if (bundle is None) == (url is None):
        raise FarError("give either a BUNDLE to serve or the --url of a running server")
    if url and compare_batching:
        raise FarError("--compare-batching starts both of its servers: give a BUNDLE in place of --url")
    if url and not elsewhere and not is_loopback(urlsplit(url).hostname or ""):
        raise FarError(f"--url {url}: is another machine; test a server there only if it is yours, with --elsewhere")
    if not (key.isascii() and key.isprintable()):
        raise FarError("--key: has characters that a header cannot carry; give it as it is in the server's file")
    if file:
        check_file(file, "--json")
    try:
        fields = dict(json.loads(ask))
    except (ValueError, TypeError) as error:
        raise FarError(f"--ask {ask}: expected a JSON object, such as {{}}") from error
    plan = Plan(
        seed=seed,
        streams=streams,
        most_pictures=max_pictures,
        fields=fields,
        clients=clients,
        rate=rate,
        seconds=minutes * 60,
        requests=max_requests,
        check=check,
    )
    before = machine()
    with contextlib.ExitStack() as stack:
        address = url or stack.enter_context(serving(bundle or Path(), options))
        if compare_batching:
            unbatched = stack.enter_context(serving(bundle or Path(), [*options, "--max-batch", "1"]))
            numbers, lines, failed = comparison(asyncio.run(plan.compare(address, unbatched, rounds, key)))
        else:
            numbers, lines, failed = report(asyncio.run(plan.run(address, key)))
        # Before the server is stopped, which may raise.
        click.echo("\n".join(lines))
        if file:
            content = {"plan": asdict(plan), "server": list(options), "before": before, **numbers}
            with whole_file(file) as aside:
                aside.write_text(json.dumps(content, indent=2))
    sys.exit(1 if failed else 0)


def main() -> None:
    """Run the command; an error is printed in one line."""
    try:
        load_test()
    except FarError as error:
        raise SystemExit(f"error: {with_options(error)}") from error


if __name__ == "__main__":
    main()
