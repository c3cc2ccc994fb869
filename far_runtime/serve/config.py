"""What a server is told, in a form that travels to other processes, and the service that it makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from far_runtime.bundle import open_bundle
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.select import Choice, best_unless
from far_runtime.serve.auth import Keys, Rate
from far_runtime.serve.metrics import Metrics, ModelWatcher
from far_runtime.serve.models import Model, Queueing, named, open_model
from far_runtime.serve.service import Limits, Service


@dataclass(frozen=True)
class ServerConfig:
    """sources: BUNDLE or NAME=BUNDLE. engines: their names, none for the best one. rate: pictures a minute. hosts:
    names by which the server may be called (None: any). check: whether bundles are compared with their checksums."""

    sources: Sequence[str]
    engines: Sequence[str] = ()
    options: EngineOptions = field(default_factory=EngineOptions)
    queueing: Queueing = field(default_factory=Queueing)
    limits: Limits = field(default_factory=Limits)
    keys: Keys | None = None
    rate: int | None = None
    hosts: frozenset[str] | None = None
    check: bool = True

    def service(self) -> tuple[Service, list[Choice]]:
        """Open models, ready to draw, and why each has its engine; FarError for a bundle or engine that cannot be
        had."""
        metrics = Metrics()
        models: list[Model] = []
        choices: list[Choice] = []
        for source in self.sources:
            name, path = named(source)
            bundle = open_bundle(path, check=self.check)
            for engine in dict.fromkeys(self.engines or (None,)):
                choice = best_unless(engine, bundle)
                called = f"{name}@{choice.name}" if len(set(self.engines)) > 1 else name
                watcher = ModelWatcher(metrics, called)
                models.append(open_model(called, bundle, choice.name, self.options, self.queueing, watcher))
                choices += [choice] if choice.reason else []
        return Service(models, metrics, self.limits, self.keys, Rate(self.rate) if self.rate else None), choices
