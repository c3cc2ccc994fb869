"""Which pictures a run of `far sample` draws, and how they are divided into shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from far_runtime.conditioning.subjects import Subject
from far_runtime.errors import FarError

SEEDS = 2**64
FORMATS = {"webdataset": ".tar", "parquet": ".parquet"}
"""Kinds of shards, and how their files end."""


@dataclass(frozen=True)
class Shard:
    """The pictures `first` to `first` + `count` - 1 of a run, which lie in one file."""

    number: int
    first: int
    count: int


@dataclass(frozen=True)
class Plan:
    """`count` pictures: picture i shows subjects[i % len(subjects)] and has the seed `seed` + i.

    settings: resolved ones. batch: pictures computed together, counted from the start of a shard, so that every picture
    has the same place in the same batch however often a run was ended, and whoever draws it. mixed: whether engines may
    differ from shard to shard. ValueError for numbers that cannot be.
    """

    subjects: Sequence[Subject]
    settings: Mapping[str, Any]
    count: int
    seed: int = 0
    batch: int = 8
    shard_size: int = 256
    format: str = "webdataset"
    mixed: bool = False

    def __post_init__(self) -> None:
        if min(len(self.subjects), self.count, self.batch, self.shard_size) < 1 or self.format not in FORMATS:
            raise ValueError("a plan of nothing, or of an unknown format")
        if not 0 <= self.seed <= SEEDS - self.count:
            raise FarError(
                f"--seed {self.seed}: with --count {self.count} the seeds go beyond 0 to {SEEDS - 1}; use others"
            )

    @property
    def shards(self) -> list[Shard]:
        """All of them, in order; the last may be smaller."""
        starts = range(0, self.count, self.shard_size)
        return [Shard(i, first, min(self.shard_size, self.count - first)) for i, first in enumerate(starts)]

    def name(self, shard: Shard) -> str:
        """Of a shard's file, such as shard-00003.tar."""
        return f"shard-{shard.number:05d}{FORMATS[self.format]}"

    def batches(self, shard: Shard) -> list[range]:
        """The numbers of the pictures that are computed together."""
        end = shard.first + shard.count
        return [range(start, min(start + self.batch, end)) for start in range(shard.first, end, self.batch)]

    def subject(self, number: int) -> Subject:
        """What a picture shows."""
        return self.subjects[number % len(self.subjects)]

    def key(self, number: int) -> str:
        """A picture's name in its shard: its seed, such as 0000000042."""
        return f"{self.seed + number:010d}"

    def keys(self, shard: Shard) -> list[str]:
        """Those of a shard, in order."""
        return [self.key(number) for number in range(shard.first, shard.first + shard.count)]

    def facts(self, bundle: str, version: str) -> dict[str, Any]:
        """All that tells the run from another one. bundle: its id. version: of this package."""
        subjects = json.dumps([astuple(subject) for subject in self.subjects])
        return {
            "bundle": bundle,
            "version": version,
            "count": self.count,
            "seed": self.seed,
            "subjects": len(self.subjects),
            "digest_of_subjects": hashlib.sha256(subjects.encode()).hexdigest()[:16],
            "settings": dict(self.settings),
            "batch_size": self.batch,
            "shard_size": self.shard_size,
            "format": self.format,
            "mixed": self.mixed,
        }
