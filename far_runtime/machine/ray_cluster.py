"""A Ray cluster: one that runs already, or one of this machine's own for as long as it is needed."""

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

from far_runtime.errors import FarError

ANSWER_SECONDS = 10.0
STORE_BYTES = 1 << 30
"""Shared memory of a cluster of this machine's own."""


@dataclass(frozen=True)
class WorkerResources:
    """What one worker or replica takes of the cluster. gpus: a fraction lets several share one. resources: by the names
    that nodes were started with."""

    cpus: float = 1.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)


def cluster_address(given: str | None) -> str | None:
    """Where the cluster runs: at the given address, else at RAY_ADDRESS; None where this machine starts its own."""
    return given or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def cluster(address: str | None, count: int, each: WorkerResources, least: int = 1) -> Iterator[Any]:
    """The module ray, connected to the cluster at `address` (else RAY_ADDRESS), or to a new one of this machine that
    ends with the block and has the CPUs for `count`. FarError where Ray is missing, nothing answers, or fewer than
    `least` fit."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise FarError("--ray needs ray; install it with: pip install 'far-deploy[ray]'") from error

    address = cluster_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to Ray's makers
    own: dict[str, Any] = {}
    if address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # its workers would give way to everything else
        own = {
            "num_cpus": max(os.cpu_count() or 1, math.ceil(count * each.cpus)),
            "resources": {name: amount * count for name, amount in each.resources.items()},
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
        }
    else:
        _check_answers(address)
    with _quiet():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            ray.init(address or "local", log_to_driver=False, **own)
        except Exception as error:  # a plain one where its processes take too long to start
            where = f"no Ray cluster answers at {address}" if address else "Ray does not start on this machine"
            reason = str(error).strip().split("\n")[0]
            raise FarError(f"{where} ({reason}); see ray status, or choose another --address") from error
        try:
            for number, handler in handlers.items():  # ray.init has set its own
                signal.signal(number, handler)
            _check_room(each, least, [node["Resources"] for node in ray.nodes() if node["Alive"]])
            yield ray
        finally:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """FarError where nothing listens at HOST:PORT, for which Ray itself would wait minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise FarError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one with: ray start --head, or "
            "choose another --address"
        ) from error


def _check_room(each: WorkerResources, least: int, nodes: Sequence[Mapping[str, float]]) -> None:
    """FarError where fewer than `least` fit into what the nodes have, whatever else runs there."""
    there = sum((Counter(node) for node in nodes), Counter[str]())
    for name, amount in _wanted(each).items():
        if amount > there[name]:
            raise FarError(
                f"{amount:g} {name} each: the cluster has {there[name]:g} in all; ask for less, or add a node "
                "that has it: ray start --address HOST:PORT"
            )
    room = sum(_fitting(each, node) for node in nodes)
    if room < least:
        each_takes = ", ".join(f"{amount:g} {name}" for name, amount in _wanted(each).items() if amount)
        raise FarError(
            f"{each_takes} each: the cluster has room for {room}, not for {least}; ask for fewer or for less each, or "
            "add a node: ray start --address HOST:PORT"
        )


def _wanted(each: WorkerResources) -> dict[str, float]:
    return {"CPU": each.cpus, "GPU": each.gpus, **each.resources}


def _fitting(each: WorkerResources, node: Mapping[str, float]) -> int:
    """How many fit into a node. One that takes a part of a GPU does not take it from two."""
    most = sys.maxsize
    for name, amount in _wanted(each).items():
        here = node.get(name, 0)
        if name == "GPU" and 0 < amount < 1:
            most = min(most, math.floor(here) * math.floor(1 / amount + 1e-9))
        elif amount:
            most = min(most, math.floor(here / amount + 1e-9))
    return most


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray, which tells much of itself, tells errors alone."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
