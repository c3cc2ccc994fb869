"""The same application on Ray Serve: replicas behind its proxy, each with its own engines and queue."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from far_runtime.errors import FarError
from far_runtime.machine.ray_cluster import WorkerResources, cluster, cluster_address
from far_runtime.progress import say
from far_runtime.serve.app import create_app
from far_runtime.serve.config import ServerConfig

APP = "far-deploy"
EXTRA_REQUESTS = 100
"""Requests that a replica accepts beyond those that it draws and queues, so that the replica itself rejects them."""

POLL_SECONDS = 0.2
"""Between two looks at the state of the replicas."""

SLOW_START_SECONDS = 40.0
"""After which the command says what it is waiting for."""

DELETE_SECONDS = 20.0
"""That Serve may take to end the replicas, beyond their grace."""

QUIET = {"log_level": "WARNING", "enable_access_log": False}

Address = tuple[str, int]
"""Host and port."""


class Replica:
    """What Serve asks of a replica beside the application."""

    app: FastAPI

    def check_health(self) -> None:
        """Raise RuntimeError if a model draws no longer; Serve then starts another replica."""
        dead = [model.name for model in self.app.state.service.models if not model.batcher.alive]
        if dead:
            raise RuntimeError(f"not drawing: {', '.join(dead)}")


def application(config: ServerConfig, replicas: tuple[int, int], resources: WorkerResources) -> Any:
    """The Serve application; replicas: fewest and most, between which the load decides."""
    from ray import serve

    def build() -> FastAPI:
        service, _ = config.open_service()
        return create_app(service, config.hosts)

    min_replicas, max_replicas = replicas
    max_batch, max_queue = config.queue.max_batch, config.queue.max_queue
    scaling: dict[str, Any] = {"num_replicas": max_replicas}
    if min_replicas != max_replicas:
        autoscaling = {
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": max_batch,
        }
        scaling = {"autoscaling_config": autoscaling}
    deployment = serve.deployment(serve.ingress(build)(Replica)).options(
        name=APP,
        ray_actor_options=resources.actor_options(),
        max_ongoing_requests=max_batch + max_queue + EXTRA_REQUESTS,
        graceful_shutdown_timeout_s=config.limits.grace,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=QUIET,
        **scaling,
    )
    return deployment.bind()


def serve_on_ray(
    config: ServerConfig,
    choose_address: Callable[[Address | None], Address],
    replicas: tuple[int, int],
    resources: WorkerResources,
    cluster_at: str | None,
    proxy_location: str,
    on_ready: Callable[[Address], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish and leave the cluster as it was.

    choose_address: where the proxies are to listen; called with the address of those that run already, or None.
    replicas: fewest and most.
    resources: of each replica.
    cluster_at: address of the cluster, None for RAY_ADDRESS or a new cluster on this machine.
    proxy_location: HeadOnly or EveryNode.
    on_ready: called with the proxies' address when enough replicas draw.
    Raises FarError if the replicas do not start, or if the cluster runs this application already.
    """
    stopping = threading.Event()
    with cluster(cluster_at, replicas[1], resources, replicas[0]) as ray:
        from ray import serve

        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # SIGINT raises KeyboardInterrupt
        joined_cluster = cluster_address(cluster_at) is not None
        running_at = _running_proxies()
        if APP in serve.status().applications:
            raise FarError(
                "far serve runs on this cluster already; end that command first, or, if it was killed, remove its "
                f"replicas: serve.delete({APP!r}) in Python"
            )
        host, port = choose_address(running_at)
        try:
            target = serve.RunTarget(application(config, replicas, resources), APP, "/", QUIET)
            try:
                if running_at is None:
                    serve.start(proxy_location, {"host": host, "port": port}, logging_config=QUIET)
                serve.run_many(
                    [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
                )
            except (RuntimeError, TimeoutError, serve.exceptions.RayServeException, ray.exceptions.RayError) as error:
                reason = str(error).strip().split("\n")[-1]
                raise FarError(f"Ray Serve does not accept the replicas: {reason}") from error
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stopping.set())
            if _wait_until_running(serve, stopping):
                on_ready((host, port))
                stopping.wait()
        finally:
            _delete_replicas(serve, config.limits.grace)
            if joined_cluster and running_at is None and not serve.status().applications:
                serve.shutdown()


def _running_proxies() -> Address | None:
    """The address of the proxies if Serve runs in the cluster already; raises FarError if it runs without any."""
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    options = client.http_config
    if options.host is None or not serve.status().proxies:
        raise FarError("Ray Serve runs in the cluster without an HTTP proxy; end it with: serve shutdown")
    return options.host, options.port


def _wait_until_running(serve: Any, stopping: threading.Event) -> bool:
    """Wait until the fewest replicas draw; False if `stopping` is set first. Raises FarError if they do not start."""
    slow_at = time.monotonic() + SLOW_START_SECONDS
    while not stopping.wait(POLL_SECONDS):
        status = serve.status().applications.get(APP)
        if status is None:
            continue
        if status.status == "RUNNING":
            return True
        if status.status == "DEPLOY_FAILED":
            raise FarError(f"the replicas do not start: {_failure_reason(status)}")
        if time.monotonic() > slow_at:
            slow_at = math.inf
            say(f"still waiting for the replicas; Ctrl-C ends the wait. {_deployment_messages(status)}")
    return False


def _delete_replicas(serve: Any, grace: float) -> None:
    """End the replicas within `grace` seconds; the proxies go on, so that responses reach their clients."""
    if APP in serve.status().applications:
        serve.delete(APP, _blocking=False)
    end = time.monotonic() + grace + DELETE_SECONDS
    while APP in serve.status().applications and time.monotonic() < end:
        time.sleep(POLL_SECONDS)


def _failure_reason(status: Any) -> str:
    """The message of the FarError in a replica's traceback, which Serve keeps; Serve's own message if there is none."""
    lines: list[str] = [
        line.strip() for deployment in status.deployments.values() for line in deployment.message.split("\n")
    ]
    for line in reversed(lines):
        _, separator, reason = line.partition("FarError: ")
        if separator:
            return reason
    return " ".join(str(status.message).split())


def _deployment_messages(status: Any) -> str:
    """What Serve says of the replicas, in one line."""
    return " ".join(" ".join(str(deployment.message).split()) for deployment in status.deployments.values())
