"""A Ray cluster: one that runs already, or a new one on this machine for as long as it is needed."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from far_runtime.errors import FarError, SettingName

CONNECT_SECONDS = 10.0
OBJECT_STORE_BYTES = 1 << 30
"""Shared memory of a cluster that is started on this machine, in bytes."""


@dataclass(frozen=True)
class WorkerResources:
    """Resources of the cluster that one worker or replica needs."""

    cpus: float = 1.0
    """Ray's CPUs."""

    gpus: float = 0.0
    """Ray's GPUs; with a fraction, several workers share one."""

    resources: Mapping[str, float] = field(default_factory=dict)
    """Ray's custom resources, by the names that nodes were started with."""

    def amounts(self) -> dict[str, float]:
        """All amounts by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, **self.resources}

    def actor_options(self) -> dict[str, Any]:
        """All amounts as the options of a Ray actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": dict(self.resources)}


def cluster_address(address: str | None) -> str | None:
    """The address, or RAY_ADDRESS; None if a new cluster is to be started on this machine."""
    return address or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def cluster(address: str | None, max_workers: int, resources: WorkerResources, min_workers: int = 1) -> Iterator[Any]:
    """The module ray, connected to a cluster.

    address: of a running cluster. None: RAY_ADDRESS, or else a new cluster on this machine that ends with the block.
    max_workers: the number of workers that a new cluster has CPUs for.
    resources: what each worker needs.
    min_workers: the number of workers that the cluster must have room for.
    Raises FarError where Ray is missing, no cluster answers, or the cluster has too little room.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise FarError(SettingName("ray"), " needs ray; install it with: pip install 'far-deploy[ray]'") from error

    address = cluster_address(address)
    # Ray would send usage statistics to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {}
    if address is None:
        # Ray would run its workers at a low priority.
        os.environ.setdefault("RAY_worker_niceness", "0")
        options = {
            "num_cpus": max(os.cpu_count() or 1, math.ceil(max_workers * resources.cpus)),
            "resources": {name: amount * max_workers for name, amount in resources.resources.items()},
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    else:
        _check_answers(address)
    with _errors_alone():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            ray.init(address or "local", log_to_driver=False, **options)
        except Exception as error:  # Ray raises a plain Exception if its processes take too long to start
            where = f"no Ray cluster answers at {address}" if address else "Ray does not start on this machine"
            reason = str(error).strip().split("\n")[0]
            raise FarError(f"{where} ({reason}); see ray status, or choose another ", SettingName("address")) from error
        try:
            for number, handler in handlers.items():  # ray.init has set its own
                signal.signal(number, handler)
            _check_capacity(resources, min_workers, [node["Resources"] for node in ray.nodes() if node["Alive"]])
            yield ray
        finally:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise FarError if nothing listens at HOST:PORT, for which Ray itself would wait minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise FarError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one with: ray start --head, or "
            "choose another ",
            SettingName("address"),
        ) from error


def _check_capacity(resources: WorkerResources, min_workers: int, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise FarError if the nodes have room for fewer than min_workers, whatever else runs there."""
    totals = sum((Counter(node) for node in nodes), Counter[str]())
    for name, amount in resources.amounts().items():
        if amount > totals[name]:
            raise FarError(
                f"{amount:g} {name} each: the cluster has {totals[name]:g} in all; ask for less, or add a node "
                "that has it: ray start --address HOST:PORT"
            )
    capacity = sum(_workers_on(node, resources) for node in nodes)
    if capacity < min_workers:
        amounts = ", ".join(f"{amount:g} {name}" for name, amount in resources.amounts().items() if amount)
        raise FarError(
            f"{amounts} each: the cluster has room for {capacity}, not for {min_workers}; ask for fewer or for less "
            "each, or add a node: ray start --address HOST:PORT"
        )


def _workers_on(node: Mapping[str, float], resources: WorkerResources) -> int:
    """How many workers a node has room for; a fraction of a GPU comes from one GPU, never from two."""
    count = sys.maxsize
    for name, amount in resources.amounts().items():
        available = node.get(name, 0)
        if name == "GPU" and 0 < amount < 1:
            count = min(count, math.floor(available) * math.floor(1 / amount + 1e-9))
        elif amount:
            count = min(count, math.floor(available / amount + 1e-9))
    return count


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Within the block, loggers print errors only: Ray logs much of what it does."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
