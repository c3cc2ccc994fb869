"""The metadata of a picture: enough to repeat it bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from far_runtime.conditioning.subjects import Subject

MAX_BATCH, MAX_THREADS = 4096, 1024
"""More than any machine needs; metadata that is damaged must not take all of the memory."""


@dataclass(frozen=True)
class PictureMetadata:
    """Everything that decides the bits of a picture."""

    bundle: str
    """Id of the bundle's content."""
    label: int | None
    """Number of its class; None for a prompt."""
    name: str
    """Name of its class, or the prompt."""
    seed: int
    sampling: dict[str, Any]
    """The resolved sampling settings by name."""
    engine: str
    """Name of the engine, such as "onnxruntime:cpu"."""
    engine_version: str
    threads: int | None
    """Threads of the CPU; None for the engine's own choice."""
    batch: int
    """Pictures of its batch: an engine may round differently in batches of other sizes."""
    index: int
    """Its row in the batch, from 0."""
    version: str
    """Version of far-deploy."""
    negative: str = ""
    """The prompt that guidance led away from."""
    edited: dict[str, str] = field(default_factory=dict)
    """What an edit started from, by name; empty for a picture that is no edit."""

    @property
    def caption(self) -> str:
        """The label with its name, or the prompt."""
        return self.subject.caption

    @property
    def subject(self) -> Subject:
        """What the picture shows."""
        return Subject(self.label, self.name, self.negative)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that is stored in a picture."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PictureMetadata:
        """The metadata of a stored JSON object; KeyError, TypeError, AttributeError, ValueError or OverflowError where
        the object is incomplete or wrong."""
        metadata = PictureMetadata(
            bundle=str(data["bundle"]),
            label=None if data["label"] is None else int(data["label"]),
            name=str(data["name"]),
            seed=int(data["seed"]),
            sampling=dict(data["sampling"]),
            engine=str(data["engine"]),
            engine_version=str(data["engine_version"]),
            threads=None if data["threads"] is None else int(data["threads"]),
            batch=int(data["batch"]),
            index=int(data["index"]),
            version=str(data["version"]),
            negative=str(data["negative"]),
            edited={str(name): str(value) for name, value in data["edited"].items()},
        )
        if not 0 <= metadata.index < metadata.batch:
            raise ValueError(f"picture {metadata.index} of a batch of {metadata.batch}")
        if metadata.batch > MAX_BATCH:
            raise ValueError(f"a batch of {metadata.batch}; expected 1 to {MAX_BATCH}")
        if metadata.threads is not None and not 1 <= metadata.threads <= MAX_THREADS:
            raise ValueError(f"{metadata.threads} threads; expected 1 to {MAX_THREADS}")
        return metadata

    def differences(self, surroundings: Mapping[str, Any]) -> list[str]:
        """In words, what is not the same in these surroundings (`Pipeline.surroundings`)."""
        return [
            f"{name.replace('_', ' ')} {getattr(self, name)} then, {value} now"
            for name, value in surroundings.items()
            if getattr(self, name) != value
        ]
