"""The metrics at `/metrics`, in Prometheus's format."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from far_runtime.serve.middleware import App, Message, Receive, Scope, Send

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The collectors of one server; on Linux also its process's memory, CPU seconds and open files."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def histogram(name: str, help: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
            return Histogram(name, help, labels, buckets=buckets, registry=self.registry)

        self.stage_seconds = histogram(
            "far_stage_seconds", "Seconds of one call of a stage", ("model", "stage"), SECONDS_BUCKETS
        )
        self.wait_seconds = histogram(
            "far_wait_seconds", "Seconds that a picture waited in the queue", ("model",), SECONDS_BUCKETS
        )
        self.batch_size = histogram("far_batch_size", "Pictures of a batch", ("model",), BATCH_SIZE_BUCKETS)
        self.request_seconds = histogram(
            "far_request_seconds",
            "Seconds from a request to the start of its response",
            ("route", "status"),
            SECONDS_BUCKETS,
        )
        self.queue_length = Gauge("far_queue_length", "Pictures in the queue", ("model",), registry=self.registry)
        self.pictures = Counter("far_pictures", "Pictures drawn", ("model",), registry=self.registry)
        self.rejections = Counter("far_rejections", "Requests rejected, by reason", ("reason",), registry=self.registry)


class ModelMetrics:
    """Records what the batcher of one model reports."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        metrics.queue_length.labels(model).set(0)

    def queue_changed(self, length: int) -> None:
        self._metrics.queue_length.labels(self._model).set(length)

    def batch_drawn(self, size: int, waits: Sequence[float], stages: Mapping[str, Sequence[float]]) -> None:
        self._metrics.batch_size.labels(self._model).observe(size)
        self._metrics.pictures.labels(self._model).inc(size)
        for seconds in waits:
            self._metrics.wait_seconds.labels(self._model).observe(seconds)
        for stage, calls in stages.items():
            for seconds in calls:
                self._metrics.stage_seconds.labels(self._model, stage).observe(seconds)


class MetricsMiddleware:
    """Records the seconds of every request, by the route that answered it and the status."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()

        async def timed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                seconds = time.perf_counter() - started
                self.metrics.request_seconds.labels(route, str(message["status"])).observe(seconds)
            await send(message)

        await self.app(scope, receive, timed_send)
