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
from far_runtime.serve.auth import ApiKeys, RateLimiter
from far_runtime.serve.batching import QueueConfig
from far_runtime.serve.metrics import Metrics, ModelMetrics
from far_runtime.serve.models import Model, open_model
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
    *bundles: Path,
    limits: Limits | None = None,
    keys: ApiKeys | None = None,
    rate_limiter: RateLimiter | None = None,
    hosts: frozenset[str] | None = None,
    queue: QueueConfig | None = None,
    prepare: Callable[[Model], None] = lambda model: None,
) -> Iterator[str]:
    """The address of a server of these bundles, under the names of their folders; prepare: called with each model."""
    metrics, options, models = Metrics(), EngineOptions(threads=1), []
    for path in bundles:
        observer = ModelMetrics(metrics, path.name)
        model = open_model(path.name, open_bundle(path), "onnxruntime", options, queue or QueueConfig(), observer)
        prepare(model)
        models.append(model)
    service = Service(models, metrics, limits=limits or Limits(), keys=keys, rate_limiter=rate_limiter)
    with running(service, hosts) as address:
        yield address


@pytest.fixture(scope="session")
def serve() -> Serve:
    """`served`, for tests that need their own server."""
    return served


@pytest.fixture(scope="session")
def address(tiny: Any) -> Iterator[str]:
    """A server of the tiny FAR and the tiny FAR-T2I."""
    with served(tiny.bundle, tiny.t2i_bundle) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    """A client of that server."""
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
