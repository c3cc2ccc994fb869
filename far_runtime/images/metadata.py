"""What a picture was made with: enough to make it again, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from far_runtime.conditioning.subjects import Subject

MAX_BATCH, MAX_THREADS = 4096, 1024
"""More than any machine wants; a damaged picture shall not ask for all of the memory."""


@dataclass(frozen=True)
class PictureMetadata:
    """Everything that decides a picture's bits.

    bundle: id of the bundle's content. label: the class, or None for a prompt. name: the class's name, or the prompt.
    negative: the prompt that guidance led away from. sampling: the system's settings by name, as its `resolve_settings`
    returns them. batch, index: how many pictures were computed together, and which of them this one was, since an
    engine may round differently by shape and row. threads: None is the engine's own choice. edited: what an edit
    started from, by name (empty: drawn from nothing).
    """

    bundle: str
    label: int | None
    name: str
    seed: int
    sampling: dict[str, Any]
    engine: str
    engine_version: str
    threads: int | None
    batch: int
    index: int
    version: str
    negative: str = ""
    edited: dict[str, str] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """The label with its name, where it has one; or the prompt."""
        return self.subject.caption

    @property
    def subject(self) -> Subject:
        """What the picture shows."""
        return Subject(self.label, self.name, self.negative)

    def to_dict(self) -> dict[str, Any]:
        """As it is stored in a picture."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PictureMetadata:
        """Settings from their stored form; KeyError, TypeError, AttributeError, ValueError or OverflowError where it
        is incomplete or wrong."""
        settings = PictureMetadata(
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
        if not 0 <= settings.index < settings.batch:
            raise ValueError(f"picture {settings.index} of a batch of {settings.batch}")
        if settings.batch > MAX_BATCH:
            raise ValueError(f"a batch of {settings.batch}; expected 1 to {MAX_BATCH}")
        if settings.threads is not None and not 1 <= settings.threads <= MAX_THREADS:
            raise ValueError(f"{settings.threads} threads; expected 1 to {MAX_THREADS}")
        return settings

    def differences(self, surroundings: Mapping[str, Any]) -> list[str]:
        """What these surroundings (`Pipeline.surroundings`) have changed that bits may depend on."""
        return [
            f"{name.replace('_', ' ')} {getattr(self, name)} then, {value} now"
            for name, value in surroundings.items()
            if getattr(self, name) != value
        ]
