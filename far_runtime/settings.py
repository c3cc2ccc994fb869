"""What a picture was made with: enough to make it again, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MAX_BATCH, MAX_THREADS = 4096, 1024
"""More than any machine wants; a damaged picture shall not ask for all of the memory."""


@dataclass(frozen=True)
class PictureSettings:
    """Everything that decides a picture's bits.

    bundle: id of the bundle's content. levels, steps: one entry per step of the loop. guidance, temperature: the final
    values, before the schedule spreads them over the steps. batch, index: how many pictures were computed together, and
    which of them this one was, since an engine may round differently by shape and row. threads: None is the engine's
    own choice.
    """

    bundle: str
    label: int
    name: str
    seed: int
    guidance: float
    temperature: float
    levels: tuple[int, ...]
    steps: tuple[int, ...]
    engine: str
    engine_version: str
    threads: int | None
    batch: int
    index: int
    version: str

    @property
    def caption(self) -> str:
        """The label with its name, where it has one."""
        return f"{self.label} {self.name}".strip()

    def to_dict(self) -> dict[str, Any]:
        """As it is stored in a picture."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PictureSettings:
        """Settings from their stored form; KeyError, TypeError, ValueError or OverflowError where it is incomplete or
        wrong."""
        settings = PictureSettings(
            bundle=str(data["bundle"]),
            label=int(data["label"]),
            name=str(data["name"]),
            seed=int(data["seed"]),
            guidance=float(data["guidance"]),
            temperature=float(data["temperature"]),
            levels=tuple(int(level) for level in data["levels"]),
            steps=tuple(int(steps) for steps in data["steps"]),
            engine=str(data["engine"]),
            engine_version=str(data["engine_version"]),
            threads=None if data["threads"] is None else int(data["threads"]),
            batch=int(data["batch"]),
            index=int(data["index"]),
            version=str(data["version"]),
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
