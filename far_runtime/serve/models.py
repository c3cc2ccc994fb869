"""The bundles that a server draws from, each with its engine and its queue."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_runtime.bundle import Bundle, Manifest
from far_runtime.conditioning.subjects import Subject, null_subject, resolve_subjects, takes_text
from far_runtime.conditioning.text import check_encoder, load_tokenizer
from far_runtime.engines import open_engine
from far_runtime.engines.base import EngineOptions
from far_runtime.engines.timed import timed
from far_runtime.errors import FarError, as_option, fields_for_options
from far_runtime.model_name import check_name
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.presets import preset_names, preset_of
from far_runtime.sampling.settings import plan_of, resolve_settings, sampler_of
from far_runtime.serve.batching import Batcher, Watcher


@dataclass(frozen=True)
class Queueing:
    """How pictures wait: `Batcher`'s largest, patience and room."""

    max_batch: int = 8
    max_wait: float = 0.01
    max_queue: int = 64


@dataclass(frozen=True)
class Model:
    """A bundle under the name that requests call it by."""

    name: str
    bundle: Bundle
    batcher: Batcher
    created: int

    @property
    def manifest(self) -> Manifest:
        """The bundle's."""
        return self.bundle.manifest

    @property
    def size(self) -> str:
        """Of its pictures, as OpenAI's API writes it: 64x64."""
        side = self.manifest.model["image_size"]
        return f"{side}x{side}"

    def subject(self, prompt: str | None, label: int | str | None, negative: str, anything: bool = False) -> Subject:
        """What is to be drawn; FarError where it cannot be. A model of labels takes a prompt for a class's name.
        anything: whether nothing may be asked for, as in an edit."""
        if negative and not takes_text(self.manifest):
            raise FarError(f"negative: {self.name} draws from class labels; leave it out")
        if anything and label is None and not prompt:
            return null_subject(self.manifest, negative)
        if takes_text(self.manifest):
            if label is not None:
                raise FarError(f"label {label!r}: {self.name} draws from text; give a prompt")
            if not prompt:
                raise FarError("no prompt; say what to draw")
            return resolve_subjects(self.manifest, prompts=[prompt], negative=negative)[0]
        wanted = prompt if label is None else label
        if wanted is None:
            raise FarError("neither prompt nor label; say what to draw")
        with fields_for_options():
            return resolve_subjects(self.manifest, labels=[wanted])[0]

    def check_editing(self) -> None:
        """FarError where it cannot edit."""
        if not self.edits:
            raise FarError(f"{self.name}: its bundle has no encode stage, so it cannot edit; export it with one")

    @property
    def edits(self) -> bool:
        """Whether it can draw into pictures."""
        return any(graph.stage == "encode" for graph in self.manifest.graphs)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All sampling settings; FarError for those that cannot be."""
        with fields_for_options():
            return resolve_settings(self.manifest, {name: as_option(name, value) for name, value in given.items()})

    def steps(self, settings: Mapping[str, Any]) -> list[str]:
        """The names of the loop's steps."""
        return [step.name for step in plan_of(self.manifest, settings)]

    def about(self) -> dict[str, Any]:
        """What a client wants to know of it."""
        manifest = self.manifest
        return {
            "system": manifest.system,
            "condition": "text" if takes_text(manifest) else "labels",
            "classes": list(manifest.classes),
            "count": None if takes_text(manifest) else manifest.model["classes"],
            "size": self.size,
            "grid": manifest.model["grid"],
            "options": list(sampler_of(manifest).SETTINGS),
            "defaults": resolve_settings(manifest),
            "presets": {name: preset_of(manifest, name).line for name in preset_names(manifest)},
            "engine": self.batcher.pipeline.engine.name,
            "precision": manifest.precision,
            "bundle": manifest.id,
            "editing": self.edits,
            "largest_batch": self.batcher.max_batch,
        }


def open_model(
    name: str, bundle: Bundle, engine: str, options: EngineOptions, queueing: Queueing, watcher: Watcher | None = None
) -> Model:
    """A bundle with its engine, ready to draw; FarError for an engine that cannot be had, and for a bundle that lacks
    what reads its text."""
    if takes_text(bundle.manifest):
        check_encoder(bundle.manifest, bundle.path)
        load_tokenizer(bundle.path)
    measured = timed(open_engine(bundle, engine, options))
    pipeline = Pipeline(bundle, measured, options.threads)
    max_batch = min(queueing.max_batch, bundle.manifest.largest_batch)
    batcher = Batcher(pipeline, max_batch, queueing.max_wait, queueing.max_queue, measured.seconds, watcher)
    return Model(name, bundle, batcher, int(time.time()))


def named(source: str) -> tuple[str, Path]:
    """Name and folder of NAME=BUNDLE or BUNDLE; FarError for a name that does not fit an address."""
    name, equals, path = source.partition("=")
    if not equals:
        name, path = Path(source).resolve().name, source
    check_name(name, f"NAME={path}")
    return name, Path(path)


def check_names(sources: Sequence[str]) -> None:
    """FarError where two bundles have the same name."""
    names = [named(source)[0] for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise FarError(f"two bundles are called {name}; give them names: NAME=BUNDLE")
