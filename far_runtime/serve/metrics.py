"""What `/metrics` tells, in Prometheus's format."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from far_runtime.serve.middleware import App, Message, Receive, Scope, Send

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One server's counters, and on Linux its process's memory, CPU seconds and open files. The histogram of a stage
    counts its calls, one for each step of the loop."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        one = ("model",)
        self.stages = Histogram(
            "far_stage_seconds", "Seconds of a stage's call", ("model", "stage"), buckets=SECONDS, registry=registry
        )
        self.waits = Histogram(
            "far_wait_seconds", "Seconds that a picture waited in the queue", one, buckets=SECONDS, registry=registry
        )
        self.sizes = Histogram("far_batch_size", "Pictures of a batch", one, buckets=SIZES, registry=registry)
        self.queue = Gauge("far_queue_length", "Pictures that wait", one, registry=registry)
        self.pictures = Counter("far_pictures", "Pictures drawn", one, registry=registry)
        self.rejections = Counter("far_rejections", "Requests refused, by the reason", ("reason",), registry=registry)
        self.requests = Histogram(
            "far_request_seconds",
            "Seconds of a request until its answer began",
            ("route", "status"),
            buckets=SECONDS,
            registry=registry,
        )


class ModelWatcher:
    """Puts down what a model's batcher does."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        metrics.queue.labels(model).set(0)

    def queued(self, count: int) -> None:
        self._metrics.queue.labels(self._model).set(count)

    def batch(self, size: int, waits: Sequence[float], stages: Mapping[str, Sequence[float]]) -> None:
        self._metrics.sizes.labels(self._model).observe(size)
        self._metrics.pictures.labels(self._model).inc(size)
        for seconds in waits:
            self._metrics.waits.labels(self._model).observe(seconds)
        for stage, calls in stages.items():
            for seconds in calls:
                self._metrics.stages.labels(self._model, stage).observe(seconds)


class Measured:
    """Times every request, by the route that answered it and the status."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()

        async def measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                seconds = time.perf_counter() - started
                self.metrics.requests.labels(route, str(message["status"])).observe(seconds)
            await send(message)

        await self.app(scope, receive, measured)
