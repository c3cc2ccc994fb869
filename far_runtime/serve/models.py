"""The models of a server: bundles, each with its engine and its queue."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from far_runtime.bundle import Bundle, Manifest
from far_runtime.conditioning.subjects import Subject, null_subject, resolve_subjects, takes_text
from far_runtime.conditioning.text import check_encoder, load_tokenizer
from far_runtime.engines import open_engine
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.select import Choice
from far_runtime.engines.timed import timed
from far_runtime.errors import FarError
from far_runtime.model_name import check_name
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.base import Plan
from far_runtime.sampling.options import settings_of
from far_runtime.sampling.presets import preset_names, preset_of
from far_runtime.sampling.settings import resolve_plan, resolve_settings
from far_runtime.serve.batching import Batcher, BatcherObserver, QueueConfig


@dataclass(frozen=True)
class Model:
    """A bundle that requests ask for by name."""

    name: str
    """The name in requests and in /v1/models."""

    bundle: Bundle
    """What it draws from."""

    batcher: Batcher
    """Its queue and its pipeline."""

    created: int
    """When it was opened, in seconds since 1970."""

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def size(self) -> str:
        """The size of its pictures, as OpenAI's API writes it: 64x64."""
        side = self.manifest.model.image_size
        return f"{side}x{side}"

    @property
    def can_edit(self) -> bool:
        """Whether the bundle has what editing needs."""
        return self.manifest.has_stage("encode")

    def check_editing(self) -> None:
        """Raise FarError if the model cannot edit."""
        if not self.can_edit:
            raise FarError(f"{self.name}: its bundle has no encode stage, so it cannot edit; export it with one")

    def subject(self, prompt: str | None, label: int | str | None, negative: str, allow_null: bool = False) -> Subject:
        """What a request asks for; a model of class labels reads the prompt as the name of a class.

        allow_null: whether prompt and label may both be missing, as in an edit.
        Raises FarError for what the model cannot draw.
        """
        if negative and not takes_text(self.manifest):
            raise FarError(f"negative: {self.name} draws from class labels; leave it out")
        if allow_null and label is None and not prompt:
            return null_subject(self.manifest, negative)
        if takes_text(self.manifest):
            if label is not None:
                raise FarError(f"label {label!r}: {self.name} draws from text; give a prompt")
            if not prompt:
                raise FarError("no prompt; say what to draw")
            return resolve_subjects(self.manifest, prompts=[prompt], negative=negative)[0]
        class_label = prompt if label is None else label
        if class_label is None:
            raise FarError("neither prompt nor label; say what to draw")
        return resolve_subjects(self.manifest, labels=[class_label])[0]

    def resolve(self, requested: Mapping[str, Any]) -> tuple[dict[str, Any], Plan]:
        """The resolved sampling settings of a request and the plan of the loop; raises FarError for invalid ones."""
        return resolve_plan(self.manifest, requested)

    def info(self) -> dict[str, Any]:
        """What /v1/models says of the model."""
        manifest = self.manifest
        return {
            "system": manifest.system,
            "condition": "text" if takes_text(manifest) else "labels",
            "classes": list(manifest.classes),
            "count": None if takes_text(manifest) else manifest.model.classes,
            "size": self.size,
            "grid": manifest.model.grid,
            "options": list(settings_of(manifest.system)),
            "defaults": resolve_settings(manifest),
            "presets": {name: preset_of(manifest, name).line for name in preset_names(manifest)},
            "engine": self.batcher.pipeline.engine.name,
            "precision": manifest.precision,
            "bundle": manifest.id,
            "editing": self.can_edit,
            "largest_batch": self.batcher.config.max_batch,
        }


def open_model(
    name: str,
    bundle: Bundle,
    engine: str | Choice,
    options: EngineOptions,
    queue: QueueConfig,
    observer: BatcherObserver | None = None,
) -> Model:
    """Open a bundle's engine and start its batcher.

    queue: its max_batch is lowered to what the bundle's graphs take.
    Raises FarError for an engine that is not available, and for a text-to-image bundle without its text encoder.
    """
    if takes_text(bundle.manifest):
        check_encoder(bundle.manifest, bundle.path)
        load_tokenizer(bundle.path)
    timed_engine = timed(open_engine(bundle, engine, options))
    pipeline = Pipeline(bundle, timed_engine, options.threads)
    queue = replace(queue, max_batch=min(queue.max_batch, bundle.manifest.largest_batch))
    batcher = Batcher(pipeline, queue, timed_engine.seconds, observer)
    return Model(name, bundle, batcher, int(time.time()))


def parse_source(source: str) -> tuple[str, Path]:
    """Name and folder of a source, NAME=BUNDLE or BUNDLE; raises FarError for a name that a URL cannot hold."""
    name, equals, path = source.partition("=")
    if not equals:
        name, path = Path(source).resolve().name, source
    check_name(name, f"NAME={path}")
    return name, Path(path)


def check_unique_names(sources: Sequence[str]) -> None:
    """Raise FarError if two sources have the same name."""
    names = [parse_source(source)[0] for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise FarError(f"two bundles are called {name}; give them names: NAME=BUNDLE")
