"""The same application on Ray Serve: replicas behind its proxy, each with engines and a queue of its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from far_runtime.cluster import Each, cluster, cluster_address
from far_runtime.errors import FarError
from far_runtime.serve.app import create_app
from far_runtime.serve.opening import Setting

APP = "far-deploy"
BESIDES = 100
"""Requests that a replica takes beyond the pictures that it draws and lets wait, so that it is the one to refuse."""

QUIET = {"log_level": "WARNING", "enable_access_log": False}


class Replica:
    """What Serve asks of a replica beside the application."""

    app: FastAPI

    def check_health(self) -> None:
        """RuntimeError where a model does not draw any longer: Serve then starts another replica."""
        dead = [model.name for model in self.app.state.service.models if not model.batcher.alive]
        if dead:
            raise RuntimeError(f"not drawing: {', '.join(dead)}")


def application(setting: Setting, replicas: tuple[int, int], each: Each) -> Any:
    """The Serve application: replicas from the first number to the second, by the load."""
    from ray import serve

    def build() -> FastAPI:
        service, _ = setting.service()
        return create_app(service, setting.hosts)

    least, most = replicas
    largest, room, grace = setting.queueing.largest, setting.queueing.room, setting.limits.grace
    options: dict[str, Any] = {"num_replicas": most}
    if least != most:
        options = {
            "autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": largest}
        }
    resources = {"num_cpus": each.cpus, "num_gpus": each.gpus, "resources": dict(each.resources)}
    made = serve.deployment(serve.ingress(build)(Replica)).options(
        name=APP,
        ray_actor_options=resources,
        max_ongoing_requests=largest + room + BESIDES,
        graceful_shutdown_timeout_s=grace,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=QUIET,
        **options,
    )
    return made.bind()


def serve_on_ray(
    setting: Setting, host: str, port: int, replicas: tuple[int, int], each: Each, address: str | None,
    proxies: str, ready: Callable[[], None],
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT, then take no more requests, let those that run finish, and leave the cluster as it
    was. proxies: HeadOnly, or EveryNode. ready: called when every replica draws. FarError where they do not."""
    ending = threading.Event()
    with cluster(address, replicas[1], each) as ray:
        from ray import serve

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ending.set())
        lasting = cluster_address(address) is not None
        started = not serve.status().proxies
        serve.start(proxies, {"host": host, "port": port}, logging_config=QUIET)
        try:
            try:
                serve.run(application(setting, replicas, each), name=APP, route_prefix="/", logging_config=QUIET)
            except (RuntimeError, ray.exceptions.RayError) as error:
                raise FarError(f"the replicas do not start: {_reason(error, serve.status())}") from error
            ready()
            ending.wait()
        finally:
            serve.delete(APP)  # the proxies go on, so that answers reach their readers
            if lasting and started:
                serve.shutdown()


def _reason(error: Exception, status: Any) -> str:
    """Why, out of the replicas' tracebacks that Serve keeps; its own words where there are none."""
    application = status.applications.get(APP)
    told: list[str] = [one.message for one in application.deployments.values()] if application else []
    lines = [line.strip() for text in told for line in text.split("\n")]
    for line in reversed(lines):
        _, found, reason = line.partition("FarError: ")
        if found:
            return reason
    return " ".join(str(error).split())
