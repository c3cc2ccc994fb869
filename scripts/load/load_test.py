"""Puts load on `far serve` and reports how it bears it.

\b
    python scripts/load/load_test.py BUNDLE [OPTIONS] [-- OPTIONS OF far serve]   a server of its own, on a free port
    python scripts/load/load_test.py --url http://127.0.0.1:8000 [OPTIONS]        one that runs

Closed loop: --clients ask, each again when it was answered. Open loop, with --rate: requests arrive by lot, so many a
second, and their seconds count from when they were due. What is asked (labels, seeds, pictures of a request, streams or
not) depends on --seed alone. --minutes 60 is a soak: memory is looked at every second. Afterwards some of the pictures
are drawn once more, alone: they may differ by one of 255. --compare-batching runs two servers in turn, with their
--max-batch and with 1. A run ends by itself; Ctrl-C ends it early, with a report. Exits with 1 where a request failed
(429 apart), a picture differs, no picture came, or the server is gone at the end; it reports all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from far_runtime.errors import FarError
from far_runtime.storage.atomic import check_file, whole_file
from report import comparison, machine, report
from run import Plan
from serve_process import check_loopback, serving


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option("--url", help="A server that runs, in place of BUNDLE.")
@click.option("--elsewhere", is_flag=True, help="Let --url be another machine. Only for servers of your own.")
@click.option("--key", envvar="FAR_KEY", show_envvar=True, default="", help="One of a server's that has --keys.")
@click.option("--clients", type=click.IntRange(1, 1000), default=8, show_default=True, help="Of the closed loop.")
@click.option("--rate", type=click.FloatRange(0.01, 1000), help="Requests a second of the open loop, in place of it.")
@click.option("--minutes", type=click.FloatRange(0.01, 1440), default=1.0, show_default=True)
@click.option("--requests", "most", type=click.IntRange(1), help="End after so many, if that is earlier.")
@click.option("--streams", type=click.FloatRange(0, 1), default=0.25, show_default=True, help="Share of streams.")
@click.option("--n", "most_pictures", type=click.IntRange(1, 64), default=2, show_default=True, help="1 to N pictures.")
@click.option("--ask", default="{}", metavar="JSON", help='Fields of every request, such as {"steps": 4}.')
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--check", "keep", type=click.IntRange(0), default=8, show_default=True, help="Pictures to draw again.")
@click.option("--compare-batching", is_flag=True, help="Against a second server that draws one by one.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of that comparison.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to put the numbers.")
def load_test(
    bundle: Path | None, options: tuple[str, ...], url: str | None, elsewhere: bool, key: str, clients: int,
    rate: float | None, minutes: float, most: int | None, streams: float, most_pictures: int, ask: str, seed: int,
    keep: int, compare_batching: bool, rounds: int, file: Path | None,
) -> None:  # fmt: skip
    if (bundle is None) == (url is None):
        raise FarError("give either a BUNDLE to serve or the --url of a server that runs")
    if url and compare_batching:
        raise FarError("--compare-batching starts both of its servers: give a BUNDLE in place of --url")
    if url and not elsewhere:
        check_loopback(url)
    if not (key.isascii() and key.isprintable()):
        raise FarError("--key: has characters that a header cannot carry; give it as it is in the server's file")
    if file:
        check_file(file, "--json")
    try:
        fields = dict(json.loads(ask))
    except (ValueError, TypeError) as error:
        raise FarError(f"--ask {ask}: expected a JSON object, such as {{}}") from error
    plan = Plan(seed, streams, most_pictures, fields, clients, rate, minutes * 60, most, keep)
    before = machine()
    with contextlib.ExitStack() as stack:
        address = url or stack.enter_context(serving(bundle or Path(), options))
        if compare_batching:
            alone = stack.enter_context(serving(bundle or Path(), [*options, "--max-batch", "1"]))
            turns = asyncio.run(plan.compared(address, alone, rounds, key))
            found, lines, failed = comparison(turns)
        else:
            found, lines, failed = report(asyncio.run(plan.run(address, key)))
        # Before its own server is ended, which may raise.
        click.echo("\n".join(lines))
        if file:
            with whole_file(file) as aside:
                aside.write_text(
                    json.dumps({"plan": asdict(plan), "server": list(options), "before": before, **found}, indent=2)
                )
    sys.exit(1 if failed else 0)


def main() -> None:
    """The command, with one line for what is wrong."""
    try:
        load_test()
    except FarError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
