"""Real servers over the tiny bundles, in a thread of the tests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from far_runtime.bundle import open_bundle
from far_runtime.engines.base import EngineOptions
from far_runtime.serve.app import create_app
from far_runtime.serve.auth import Keys, Rate
from far_runtime.serve.metrics import Metrics, ModelWatcher
from far_runtime.serve.models import Model, Queueing, open_model
from far_runtime.serve.service import Limits, Service

Serve = Callable[..., AbstractContextManager[str]]


@contextlib.contextmanager
def running(service: Service, hosts: frozenset[str] | None = None) -> Iterator[str]:
    """The address of a server of this service."""
    server = uvicorn.Server(uvicorn.Config(create_app(service, hosts), "127.0.0.1", 0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def served(
    *bundles: Path, limits: Limits | None = None, keys: Keys | None = None, rate: Rate | None = None,
    hosts: frozenset[str] | None = None, queueing: Queueing | None = None,
    change: Callable[[Model], None] = lambda model: None,
) -> Iterator[str]:  # fmt: skip
    """A server of these bundles, under the names of their folders. change: what a test does to a model beforehand."""
    metrics, options, models = Metrics(), EngineOptions(threads=1), []
    for path in bundles:
        watcher = ModelWatcher(metrics, path.name)
        model = open_model(path.name, open_bundle(path), "onnxruntime", options, queueing or Queueing(), watcher)
        change(model)
        models.append(model)
    with running(Service(models, metrics, limits or Limits(), keys, rate), hosts) as address:
        yield address


@pytest.fixture(scope="session")
def serve() -> Serve:
    """`served`, for tests that want a server of their own."""
    return served


@pytest.fixture(scope="session")
def address(tiny: Any) -> Iterator[str]:
    """A server of the tiny FAR and the tiny FAR-T2I."""
    with served(tiny.bundle, tiny.t2i_bundle) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    """Asks that server."""
    with httpx.Client(base_url=address, timeout=60) as opened:
        yield opened
