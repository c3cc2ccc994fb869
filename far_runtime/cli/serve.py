"""`far serve`: pictures from bundles over HTTP."""

from __future__ import annotations

import ipaddress
import math
import signal
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import choice_line, engine_options, take_engines, warn_of_unused
from far_runtime.cli.ray_options import parse_resources, ray_options, refuse_without_ray
from far_runtime.errors import FarError
from far_runtime.machine.ray_cluster import WorkerResources

if TYPE_CHECKING:
    from far_runtime.serve.config import ServerConfig

PATH = click.Path(path_type=Path)
STALL_SECONDS = 30.0
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def parse_replicas(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """The fewest and the most replicas of N or MIN:MAX."""
    first, colon, last = value.partition(":")
    numbers = (first, last if colon else first)
    if not all(number.isdigit() for number in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise click.BadParameter(f"{value!r}: expected N or MIN:MAX, from 1 on, as in 1:4", ctx, param)
    return int(numbers[0]), int(numbers[1])


class Seconds(click.FloatRange):
    """A range of seconds, which nan is outside of."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value} is not a number of seconds", param, ctx)
        return seconds


@click.command(short_help="Serve pictures from bundles over HTTP.")
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: on all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on; 0: any."
)
@click.option("--keys", type=PATH, metavar="FILE", help="API keys, one per line. Default: no key is needed.")
@click.option(
    "--rate", type=click.IntRange(1), metavar="N", help="Pictures a minute for each key, or for each address."
)
@click.option("--max-batch", type=click.IntRange(1, 4096), default=8, show_default=True, help="Pictures of a batch.")
@click.option(
    "--max-wait",
    type=click.FloatRange(0, 10_000),
    default=10.0,
    show_default=True,
    metavar="MS",
    help="How long a picture waits for others to fill its batch, in milliseconds.",
)
@click.option(
    "--queue", type=click.IntRange(1), default=64, show_default=True, help="Pictures that may wait; more get a 429."
)
@click.option("--max-n", type=click.IntRange(1, 64), default=8, show_default=True, help="Pictures of one request.")
@click.option(
    "--max-prompt", type=click.IntRange(1, 1000), default=500, show_default=True, help="Characters of a prompt."
)
@click.option(
    "--max-upload",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    metavar="MIB",
    help="Size of a request with pictures to edit.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1, 64),
    default=16,
    show_default=True,
    metavar="MILLIONS",
    help="Pixels of a picture to edit.",
)
@click.option(
    "--deadline",
    type=Seconds(0, 86_400, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Time that a request may take; longer ones get a 504.",
)
@click.option(
    "--grace",
    type=Seconds(0, 86_400),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time that running requests have to finish after SIGTERM.",
)
@engine_options("the best that is installed, for each bundle", several=True)
@click.option("--no-check", is_flag=True, help="Do not compare the bundles with their checksums first.")
@click.option("--ray", "on_ray", is_flag=True, help="Serve with replicas on Ray Serve, on one machine or many.")
@click.option(
    "--replicas",
    callback=parse_replicas,
    default="1",
    show_default=True,
    metavar="N|MIN:MAX",
    help="Replicas, each with its own engines and queue; from MIN to MAX, depending on the load.",
)
@ray_options("replica")
@click.pass_context
def serve(
    ctx: click.Context, /,
    bundles: tuple[str, ...], host: str, port: int, keys: Path | None, rate: int | None, max_batch: int,
    max_wait: float, queue: int, max_n: int, max_prompt: int, max_upload: int, max_pixels: int, deadline: float,
    grace: float, no_check: bool, on_ray: bool, replicas: tuple[int, int], cpus: float, gpus: float,
    resources: tuple[str, ...], address: str | None, **options: Any,
) -> None:  # fmt: skip
    """Serve pictures from one or more BUNDLEs by OpenAI's images API, at http://HOST:PORT/v1.

    Requests that wait at the same time are drawn in one batch. The server's page to draw with is at /, the description
    of the API at /openapi.json. With several engines, every bundle is served on each of them, as BUNDLE@ENGINE. After
    SIGTERM, running requests finish."""
    if not on_ray:
        refuse_without_ray(ctx, "replicas")
    try:
        import uvicorn  # noqa: F401

        from far_runtime.serve.config import ServerConfig
        from far_runtime.serve.service import Limits
    except ModuleNotFoundError as error:
        raise FarError(f"far serve needs {error.name}; install it with: pip install 'far-deploy[serve]'") from error
    from far_runtime.serve.auth import ApiKeys
    from far_runtime.serve.batching import QueueConfig
    from far_runtime.serve.models import check_unique_names

    check_unique_names(bundles)
    engines, engine_settings = take_engines(options)
    limits = Limits(
        max_pictures=max_n,
        max_prompt=max_prompt,
        max_upload=max_upload << 20,
        max_pixels=max_pixels * 1_000_000,
        deadline=deadline,
        grace=grace,
    )
    config = ServerConfig(
        sources=bundles,
        engines=engines,
        options=engine_settings,
        queue=QueueConfig(max_batch, max_wait / 1000, queue),
        limits=limits,
        keys=ApiKeys.read(keys) if keys else None,
        rate=rate,
        hosts=LOOPBACK if is_loopback(host) else None,
        check=not no_check,
    )
    if on_ray:
        worker_resources = WorkerResources(cpus, gpus, parse_resources(resources))
        _serve_on_ray(config, (host, port), replicas, worker_resources, address)
    else:
        _serve_here(config, host, port)


def _serve_here(config: ServerConfig, host: str, port: int) -> None:
    """Serve from this process until SIGTERM or SIGINT."""
    import uvicorn

    from far_runtime.serve.app import create_app

    listening = listen(host, port)
    service, choices = config.open_service()
    for engine in dict.fromkeys(choice.name for choice in choices):
        warn_of_unused(engine)
    for line in dict.fromkeys(choice_line(choice) for choice in choices if choice.reason):
        click.echo(line, err=True)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service, config.hosts),
            host,
            port,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(config.limits.grace),
        )
    )
    # uvicorn ends in good order at these signals, then raises them once more for whoever handled them before it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    uvicorn_startup = server.startup

    async def startup(sockets: Any = None) -> None:
        await uvicorn_startup(sockets)
        if server.started:
            names = ", ".join(model.name for model in service.models)
            click.echo(f"serving {names} at {url_of(*listening.getsockname()[:2])} (page: /, API: /v1)")

    server.startup = startup  # type: ignore[method-assign]
    server.run([listening])


def _serve_on_ray(
    config: ServerConfig,
    listen_at: tuple[str, int],
    replicas: tuple[int, int],
    resources: WorkerResources,
    cluster_at: str | None,
) -> None:
    """Serve through Ray's proxies, which are started at `listen_at`, or run already at another address."""
    from far_runtime.bundle import open_bundle
    from far_runtime.serve.models import parse_source
    from far_runtime.serve.on_ray import serve_on_ray

    names, sources = [], []
    for source in config.sources:
        name, path = parse_source(source)
        open_bundle(path, check=config.check)  # what is wrong with it is said here, not by a replica
        names.append(name)
        sources.append(f"{name}={path.resolve()}")
    fewest, most = replicas
    count = f"{most}" if fewest == most else f"{fewest} to {most}"

    def on_ready(address: tuple[str, int]) -> None:
        click.echo(f"serving {', '.join(names)} at {url_of(*address)} (page: /, API: /v1), {count} replicas on Ray")

    serve_on_ray(
        config=replace(config, sources=sources),
        choose_address=partial(proxy_address, *listen_at),
        replicas=replicas,
        resources=resources,
        cluster_at=cluster_at,
        proxy_location="HeadOnly" if is_loopback(listen_at[0]) else "EveryNode",
        on_ready=on_ready,
    )


def proxy_address(host: str, port: int, running_at: tuple[str, int] | None) -> tuple[str, int]:
    """Host and port of Ray's proxies: where they run already, or else the requested ones, which have to be free.

    Raises FarError if the running proxies are for this machine alone and other machines are asked for, or the other way
    round.
    """
    if running_at is None:
        with listen(host, port) as listening:
            return host, int(listening.getsockname()[1])
    if is_loopback(host) != is_loopback(running_at[0]):
        reach = "this machine alone" if is_loopback(running_at[0]) else "other machines"
        raise FarError(
            f"--host {host}: Ray Serve runs in the cluster already, and listens at {running_at[0]}:{running_at[1]}, "
            f"for {reach}; confirm that with --host {running_at[0]}, or choose another --address"
        )
    return running_at


def url_of(host: str, port: int) -> str:
    """http://HOST:PORT."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(host: str, port: int, stall_seconds: float = STALL_SECONDS) -> socket.socket:
    """A listening socket; raises FarError if there can be none at this address.

    stall_seconds: on Linux, after which a client is disconnected that reads nothing of what is sent to it.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        if sys.platform == "linux":  # connections inherit this from the listening socket
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * stall_seconds))
        return listening
    except OSError as error:
        raise FarError(
            f"{host}:{port}: cannot listen there ({error.strerror}); choose another --port or --host"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
