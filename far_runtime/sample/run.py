"""Which pictures a run of `far sample` draws, and how they are divided into shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from far_runtime.conditioning.subjects import Subject
from far_runtime.errors import FarError, SettingName

SEEDS = 2**64
FORMATS = {"webdataset": ".tar", "parquet": ".parquet"}
"""Formats of shards, and the suffixes of their files."""


@dataclass(frozen=True)
class Shard:
    """Consecutive pictures of a run, which are stored in one file."""

    number: int
    """Which shard of the run, from 0."""

    first: int
    """Number of its first picture."""

    count: int
    """How many pictures it has."""


@dataclass(frozen=True)
class SampleRun:
    """The pictures of a run; picture i shows subjects[i % len(subjects)] and has the seed `seed` + i.

    Raises FarError for seeds beyond 64 bits, ValueError for sizes below 1 and for an unknown format.
    """

    subjects: Sequence[Subject]
    """What the pictures show, in turn."""

    settings: Mapping[str, Any]
    """Resolved sampling settings."""

    count: int
    """How many pictures."""

    seed: int = 0
    """Seed of the first picture."""

    batch_size: int = 8
    """Pictures of a batch. Batches are counted from the start of a shard, so that every picture has the same place in
    the same batch however often the run was stopped, and whoever draws it."""

    shard_size: int = 256
    """Pictures of a shard."""

    format: str = "webdataset"
    """Format of the shards, one of FORMATS."""

    mixed: bool = False
    """Whether shards may be drawn by different engines."""

    def __post_init__(self) -> None:
        if min(len(self.subjects), self.count, self.batch_size, self.shard_size) < 1 or self.format not in FORMATS:
            raise ValueError("a run without pictures, or of an unknown format")
        if not 0 <= self.seed <= SEEDS - self.count:
            raise FarError(
                SettingName("seed"),
                f" {self.seed}: with ",
                SettingName("count"),
                f" {self.count} the seeds go beyond 0 to {SEEDS - 1}; use others",
            )

    @property
    def shards(self) -> list[Shard]:
        """All shards in order; the last one may be smaller."""
        starts = range(0, self.count, self.shard_size)
        return [Shard(i, first, min(self.shard_size, self.count - first)) for i, first in enumerate(starts)]

    def file_name(self, shard: Shard) -> str:
        """The name of a shard's file, such as shard-00003.tar."""
        return f"shard-{shard.number:05d}{FORMATS[self.format]}"

    def batches(self, shard: Shard) -> list[range]:
        """The numbers of the pictures of each batch."""
        end = shard.first + shard.count
        return [range(first, min(first + self.batch_size, end)) for first in range(shard.first, end, self.batch_size)]

    def subject(self, number: int) -> Subject:
        """What a picture shows."""
        return self.subjects[number % len(self.subjects)]

    def key(self, number: int) -> str:
        """A picture's name in its shard, which is its seed, such as 0000000042."""
        return f"{self.seed + number:010d}"

    def keys(self, shard: Shard) -> list[str]:
        """The keys of a shard's pictures, in order."""
        return [self.key(number) for number in range(shard.first, shard.first + shard.count)]

    def facts(self, bundle_id: str, version: str) -> dict[str, Any]:
        """Everything that distinguishes this run from another; version: of this package."""
        subjects = json.dumps([astuple(subject) for subject in self.subjects])
        return {
            "bundle": bundle_id,
            "version": version,
            "count": self.count,
            "seed": self.seed,
            "subjects": len(self.subjects),
            "digest_of_subjects": hashlib.sha256(subjects.encode()).hexdigest()[:16],
            "settings": dict(self.settings),
            "batch_size": self.batch_size,
            "shard_size": self.shard_size,
            "format": self.format,
            "mixed": self.mixed,
        }
