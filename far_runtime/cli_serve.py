"""`far serve`: pictures from bundles over HTTP."""

from __future__ import annotations

import ipaddress
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import click

from far_runtime.cli_engine import best_unless, engine_options, take_engines
from far_runtime.errors import FarError

PATH = click.Path(path_type=Path)
STALLED = 30.0
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@click.command(short_help="Serve pictures from bundles over HTTP.")
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: at all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--keys", type=PATH, metavar="FILE", help="API keys that may draw, one a line. Default: none is needed.")
@click.option("--rate", type=click.IntRange(1), metavar="N", help="Pictures a minute for each key, or each address.")
@click.option("--max-batch", type=click.IntRange(1, 4096), default=8, show_default=True, help="Pictures of a batch.")
@click.option(
    "--max-wait",
    type=click.FloatRange(0, 10_000),
    default=10.0,
    show_default=True,
    metavar="MS",
    help="Milliseconds for which a picture waits for company in its batch.",
)
@click.option(
    "--queue", type=click.IntRange(1), default=64, show_default=True, help="Pictures that may wait; then 429."
)
@click.option("--max-n", type=click.IntRange(1, 64), default=8, show_default=True, help="Pictures of one request.")
@click.option("--max-prompt", type=click.IntRange(1, 1000), default=500, show_default=True, help="Characters.")
@click.option(
    "--max-upload",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    metavar="MIB",
    help="Of a request that brings pictures to edit.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1, 64),
    default=16,
    show_default=True,
    metavar="MILLIONS",
    help="Of such a picture.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for a request; then 504.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for what runs after SIGTERM.",
)
@engine_options("the best that is installed, for each bundle", several=True)
@click.option("--no-check", is_flag=True, help="Do not compare the bundles with their checksums first.")
def serve(
    bundles: tuple[str, ...], host: str, port: int, keys: Path | None, rate: int | None, max_batch: int,
    max_wait: float, queue: int, max_n: int, max_prompt: int, max_upload: int, max_pixels: int, deadline: float,
    grace: float, no_check: bool, **options: Any,
) -> None:  # fmt: skip
    """Serve pictures from one or more BUNDLEs by OpenAI's images API, at http://HOST:PORT/v1. Requests that wait
    together are drawn together. At / there is a page to draw with; /openapi.json describes the API. With several
    engines every bundle is served on each, as BUNDLE@ENGINE. SIGTERM lets what runs finish."""
    try:
        import uvicorn

        from far_runtime.serve.app import create_app
        from far_runtime.serve.metrics import Metrics, ModelWatcher
        from far_runtime.serve.orders import Limits, Service
    except ModuleNotFoundError as error:
        raise FarError(f"far serve needs {error.name}; install it with: pip install 'far-deploy[serve]'") from error
    from far_runtime.bundle import open_bundle
    from far_runtime.serve.keys import Keys, Rate
    from far_runtime.serve.models import Queueing, check_names, named, open_model

    check_names(bundles)
    listening = listen(host, port)
    known = Keys.read(keys) if keys else None
    engines, engine_settings = take_engines(options)
    metrics, queueing, models = Metrics(), Queueing(max_batch, max_wait / 1000, queue), []
    for source in bundles:
        name, path = named(source)
        bundle = open_bundle(path, check=not no_check)
        for engine in dict.fromkeys(engines or (None,)):
            chosen, why = best_unless(engine, bundle)
            called = f"{name}@{chosen}" if len(set(engines)) > 1 else name
            watcher = ModelWatcher(metrics, called)
            models.append(open_model(called, bundle, chosen, engine_settings, queueing, watcher))
            for line in why:
                click.echo(line, err=True)
    limits = Limits(
        pictures=max_n, prompt=max_prompt, upload=max_upload << 20, pixels=max_pixels * 1_000_000, deadline=deadline,
        grace=grace,
    )  # fmt: skip
    service = Service(models, metrics, limits, known, Rate(rate) if rate else None)
    app = create_app(service, LOOPBACK if is_loopback(host) else None)
    config = uvicorn.Config(
        app, host, port, log_level="warning", server_header=False, timeout_graceful_shutdown=round(grace),
    )  # fmt: skip
    # uvicorn ends in good order at these, then raises them once more for whoever had set handlers before it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = uvicorn.Server(config)
    began = server.startup

    async def startup(sockets: Any = None) -> None:
        await began(sockets)
        if server.started:
            address = server.servers[0].sockets[0].getsockname()
            shown = f"[{address[0]}]" if ":" in address[0] else address[0]
            names = ", ".join(model.name for model in models)
            click.echo(f"serving {names} at http://{shown}:{address[1]} (page: /, API: /v1)")

    server.startup = startup  # type: ignore[method-assign]
    server.run([listening])


def listen(host: str, port: int, stalled: float = STALLED) -> socket.socket:
    """A socket at an address; FarError where there can be none. stalled: seconds after which Linux hangs up on a client
    that takes nothing of what waits to be sent to it."""
    try:
        made = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        if sys.platform == "linux":  # connections have it from the socket that they come in at
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * stalled))
        return made
    except OSError as error:
        raise FarError(
            f"{host}:{port}: cannot listen there ({error.strerror}); choose another --port or --host"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
