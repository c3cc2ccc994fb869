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

from far_runtime.cli.engine_options import engine_options, take_engines
from far_runtime.cli.ray_options import ray_options, refuse_without_ray, resources_of
from far_runtime.errors import FarError
from far_runtime.machine.ray_cluster import WorkerResources

if TYPE_CHECKING:
    from far_runtime.serve.config import ServerConfig

PATH = click.Path(path_type=Path)
STALLED = 30.0
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def replicas_of(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """The numbers of N or MIN:MAX."""
    least, colon, most = value.partition(":")
    numbers = (least, most if colon else least)
    if not all(number.isdigit() for number in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise click.BadParameter(f"{value!r}: expected N or MIN:MAX, from 1 on, as in 1:4", ctx, param)
    return int(numbers[0]), int(numbers[1])


class Seconds(click.FloatRange):
    """A range that nan is outside of."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


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
    type=Seconds(0, 86_400, min_open=True),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for a request; then 504.",
)
@click.option(
    "--grace",
    type=Seconds(0, 86_400),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for what runs after SIGTERM.",
)
@engine_options("the best that is installed, for each bundle", several=True)
@click.option("--no-check", is_flag=True, help="Do not compare the bundles with their checksums first.")
@click.option("--ray", "on_ray", is_flag=True, help="Serve with replicas on Ray Serve, which may be on many machines.")
@click.option(
    "--replicas", callback=replicas_of, default="1", show_default=True, metavar="N|MIN:MAX",
    help="Each with engines and a queue of its own; MIN to MAX by the load.",
)  # fmt: skip
@ray_options("replica")
@click.pass_context
def serve(
    ctx: click.Context, /,
    bundles: tuple[str, ...], host: str, port: int, keys: Path | None, rate: int | None, max_batch: int,
    max_wait: float, queue: int, max_n: int, max_prompt: int, max_upload: int, max_pixels: int, deadline: float,
    grace: float, no_check: bool, on_ray: bool, replicas: tuple[int, int], cpus: float, gpus: float,
    resources: tuple[str, ...], address: str | None, **options: Any,
) -> None:  # fmt: skip
    """Serve pictures from one or more BUNDLEs by OpenAI's images API, at http://HOST:PORT/v1. Requests that wait
    together are drawn together. At / there is a page to draw with; /openapi.json describes the API. With several
    engines every bundle is served on each, as BUNDLE@ENGINE. SIGTERM lets what runs finish."""
    if not on_ray:
        refuse_without_ray(ctx, "replicas")
    try:
        import uvicorn

        from far_runtime.serve.app import create_app
        from far_runtime.serve.config import ServerConfig
        from far_runtime.serve.service import Limits
    except ModuleNotFoundError as error:
        raise FarError(f"far serve needs {error.name}; install it with: pip install 'far-deploy[serve]'") from error
    from far_runtime.serve.auth import Keys
    from far_runtime.serve.models import Queueing, check_names

    check_names(bundles)
    engines, engine_settings = take_engines(options)
    limits = Limits(
        pictures=max_n, prompt=max_prompt, upload=max_upload << 20, pixels=max_pixels * 1_000_000, deadline=deadline,
        grace=grace,
    )  # fmt: skip
    setting = ServerConfig(
        bundles, engines, engine_settings, Queueing(max_batch, max_wait / 1000, queue), limits,
        Keys.read(keys) if keys else None, rate, LOOPBACK if is_loopback(host) else None, not no_check,
    )  # fmt: skip
    if on_ray:
        _serve_on_ray(setting, host, port, replicas, WorkerResources(cpus, gpus, resources_of(resources)), address)
        return
    listening = listen(host, port)
    service, lines = setting.service()
    for line in lines:
        click.echo(line, err=True)
    app = create_app(service, setting.hosts)
    config = uvicorn.Config(
        app, host, port, log_level="warning", server_header=False, timeout_graceful_shutdown=math.ceil(grace),
    )  # fmt: skip
    # uvicorn ends in good order at these, then raises them once more for whoever had set handlers before it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = uvicorn.Server(config)
    began = server.startup

    async def startup(sockets: Any = None) -> None:
        await began(sockets)
        if server.started:
            names = ", ".join(model.name for model in service.models)
            click.echo(f"serving {names} at {address_of(*listening.getsockname()[:2])} (page: /, API: /v1)")

    server.startup = startup  # type: ignore[method-assign]
    server.run([listening])


def _serve_on_ray(
    setting: ServerConfig, host: str, port: int, replicas: tuple[int, int], each: WorkerResources, address: str | None
) -> None:
    """Serve through Ray's proxy, which is started at the address, or listens already at one of its own."""
    from far_runtime.bundle import open_bundle
    from far_runtime.serve.models import named
    from far_runtime.serve.on_ray import serve_on_ray

    names, sources = [], []
    for source in setting.sources:
        name, path = named(source)
        open_bundle(path, check=setting.check)  # what is wrong with it is said here, not by a replica
        names.append(name)
        sources.append(f"{name}={path.resolve()}")
    least, most = replicas
    count = f"{most}" if least == most else f"{least} to {most}"

    def ready(at: tuple[str, int]) -> None:
        click.echo(f"serving {', '.join(names)} at {address_of(*at)} (page: /, API: /v1), {count} replicas on Ray")

    proxies = "HeadOnly" if is_loopback(host) else "EveryNode"
    place = partial(place_of_proxies, host, port)
    serve_on_ray(replace(setting, sources=sources), place, replicas, each, address, proxies, ready)


def place_of_proxies(host: str, port: int, running: tuple[str, int] | None) -> tuple[str, int]:
    """Host and port of Ray's proxies: where they listen already; None: those that are asked for, which have to be free.
    FarError where that is for this machine alone and is asked for others, or the other way round."""
    if running is None:
        with listen(host, port) as listening:
            return host, int(listening.getsockname()[1])
    if is_loopback(host) != is_loopback(running[0]):
        who = "this machine alone" if is_loopback(running[0]) else "other machines"
        raise FarError(
            f"--host {host}: Ray Serve runs in the cluster already, and listens at {running[0]}:{running[1]}, "
            f"for {who}; say so with --host {running[0]}, or choose another --address"
        )
    return running


def address_of(host: str, port: int) -> str:
    """http://HOST:PORT."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
