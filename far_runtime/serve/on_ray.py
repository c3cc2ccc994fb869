"""The same application on Ray Serve: replicas behind its proxy, each with engines and a queue of its own."""

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
BESIDES = 100
"""Requests that a replica takes beyond the pictures that it draws and lets wait, so that it is the one to refuse."""

POLL, PATIENCE, DELETE_SECONDS = 0.2, 40.0, 20.0
"""Seconds between two looks at the replicas; of silence before the wait for them is spoken of; and for which Serve may
take longer to end them than their grace."""

QUIET = {"log_level": "WARNING", "enable_access_log": False}


class Replica:
    """What Serve asks of a replica beside the application."""

    app: FastAPI

    def check_health(self) -> None:
        """RuntimeError where a model does not draw any longer: Serve then starts another replica."""
        dead = [model.name for model in self.app.state.service.models if not model.batcher.alive]
        if dead:
            raise RuntimeError(f"not drawing: {', '.join(dead)}")


def application(setting: ServerConfig, replicas: tuple[int, int], each: WorkerResources) -> Any:
    """The Serve application: replicas from the first number to the second, by the load."""
    from ray import serve

    def build() -> FastAPI:
        service, _ = setting.service()
        return create_app(service, setting.hosts)

    least, most = replicas
    max_batch, max_queue, grace = setting.queueing.max_batch, setting.queueing.max_queue, setting.limits.grace
    options: dict[str, Any] = {"num_replicas": most}
    if least != most:
        options = {
            "autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": max_batch}
        }
    resources = {"num_cpus": each.cpus, "num_gpus": each.gpus, "resources": dict(each.resources)}
    made = serve.deployment(serve.ingress(build)(Replica)).options(
        name=APP,
        ray_actor_options=resources,
        max_ongoing_requests=max_batch + max_queue + BESIDES,
        graceful_shutdown_timeout_s=grace,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=QUIET,
        **options,
    )
    return made.bind()


def serve_on_ray(
    setting: ServerConfig, place: Callable[[tuple[str, int] | None], tuple[str, int]], replicas: tuple[int, int],
    each: WorkerResources, address: str | None, proxies: str, ready: Callable[[tuple[str, int]], None],
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT, then take no more requests, let those that run finish, and leave the cluster as it
    was. place: given host and port of the proxies that run already, or None, says where they are to be. proxies:
    HeadOnly, or EveryNode. ready: called when every replica draws. FarError where they do not, or where the cluster
    serves this application already."""
    ending = threading.Event()
    with cluster(address, replicas[1], each, replicas[0]) as ray:
        from ray import serve

        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # SIGINT raises KeyboardInterrupt
        lasting = cluster_address(address) is not None
        running = _proxies_of_others()
        if APP in serve.status().applications:
            raise FarError(
                "far serve runs on this cluster already; end that one first, or, if it was killed, what it left: "
                f"serve.delete({APP!r}) in Python"
            )
        host, port = place(running)
        try:
            target = serve.RunTarget(application(setting, replicas, each), APP, "/", QUIET)
            try:
                if running is None:
                    serve.start(proxies, {"host": host, "port": port}, logging_config=QUIET)
                serve.run_many(
                    [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
                )
            except (RuntimeError, TimeoutError, serve.exceptions.RayServeException, ray.exceptions.RayError) as error:
                reason = str(error).strip().split("\n")[-1]
                raise FarError(f"Ray Serve does not take the replicas: {reason}") from error
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: ending.set())
            if _started(serve, ending):
                ready((host, port))
                ending.wait()
        finally:
            _end(serve, setting.limits.grace)
            if lasting and running is None and not serve.status().applications:
                serve.shutdown()


def _proxies_of_others() -> tuple[str, int] | None:
    """Host and port of the proxies, where Serve runs in the cluster; FarError where it runs without."""
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    options = client.http_config
    if options.host is None or not serve.status().proxies:
        raise FarError("Ray Serve runs in the cluster without an HTTP proxy; start it anew with one: serve shutdown")
    return options.host, options.port


def _started(serve: Any, ending: threading.Event) -> bool:
    """Wait until the least number of replicas draws; False if the end came first. FarError where they do not start."""
    told = time.monotonic() + PATIENCE
    while not ending.wait(POLL):
        application = serve.status().applications.get(APP)
        if application is None:
            continue
        if application.status == "RUNNING":
            return True
        if application.status == "DEPLOY_FAILED":
            raise FarError(f"the replicas do not start: {_reason(application)}")
        if time.monotonic() > told:
            told = math.inf
            say(f"the replicas are not there yet; Ctrl-C ends the wait. {_state_of(application)}")
    return False


def _end(serve: Any, grace: float) -> None:
    """End the replicas, for which they have their grace; the proxies go on, so that answers reach their readers."""
    if APP in serve.status().applications:
        serve.delete(APP, _blocking=False)
    end = time.monotonic() + grace + DELETE_SECONDS
    while APP in serve.status().applications and time.monotonic() < end:
        time.sleep(POLL)


def _reason(application: Any) -> str:
    """Why, out of the replicas' tracebacks that Serve keeps; its own words where there are none."""
    lines: list[str] = [line.strip() for one in application.deployments.values() for line in one.message.split("\n")]
    for line in reversed(lines):
        _, found, reason = line.partition("FarError: ")
        if found:
            return reason
    return " ".join(str(application.message).split())


def _state_of(application: Any) -> str:
    """What Serve says of the replicas that it waits for."""
    return " ".join(" ".join(str(one.message).split()) for one in application.deployments.values())
