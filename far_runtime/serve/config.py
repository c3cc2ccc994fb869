"""The configuration of a server, in a form that travels to other processes, and the service made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from far_runtime.bundle import open_bundle
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.select import Choice, best_unless
from far_runtime.serve.auth import ApiKeys, RateLimiter
from far_runtime.serve.batching import QueueConfig
from far_runtime.serve.metrics import Metrics, ModelMetrics
from far_runtime.serve.models import Model, open_model, parse_source
from far_runtime.serve.service import Limits, Service


@dataclass(frozen=True)
class ServerConfig:
    """What a server serves, and how."""

    sources: Sequence[str]
    """The bundles, each as BUNDLE or NAME=BUNDLE."""

    engines: Sequence[str] = ()
    """Names of the engines, each of which serves every bundle; empty for the best engine of each bundle."""

    options: EngineOptions = field(default_factory=EngineOptions)
    """How the engines run."""

    queue: QueueConfig = field(default_factory=QueueConfig)
    """The queue of each model."""

    limits: Limits = field(default_factory=Limits)
    """What a client may ask for."""

    keys: ApiKeys | None = None
    """The API keys, None to serve everyone."""

    rate: int | None = None
    """Pictures a minute for each client, None for no limit."""

    hosts: frozenset[str] | None = None
    """Host names that the server answers to, None for any."""

    check: bool = True
    """Whether bundles are compared with their checksums first."""

    def open_service(self) -> tuple[Service, list[Choice]]:
        """Open the models; returns the service and the engine of each model, with the reason if it was chosen here.

        Raises FarError for a bundle or an engine that cannot be opened.
        """
        metrics = Metrics()
        models: list[Model] = []
        choices: list[Choice] = []
        for source in self.sources:
            bundle_name, path = parse_source(source)
            bundle = open_bundle(path, check=self.check)
            for engine in dict.fromkeys(self.engines or (None,)):
                choice = best_unless(engine, bundle)
                name = f"{bundle_name}@{choice.name}" if len(set(self.engines)) > 1 else bundle_name
                observer = ModelMetrics(metrics, name)
                models.append(open_model(name, bundle, choice, self.options, self.queue, observer))
                choices.append(choice)
        rate_limiter = RateLimiter(self.rate) if self.rate else None
        return Service(models, metrics, limits=self.limits, keys=self.keys, rate_limiter=rate_limiter), choices
