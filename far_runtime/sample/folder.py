"""The folder that a run of `far sample` fills: what is there, and what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_runtime.errors import FarError
from far_runtime.sample.draw import Made
from far_runtime.sample.plan import Plan, Shard
from far_runtime.sample.shards import found_keys
from far_runtime.storage.atomic import check_folder, whole_file
from far_runtime.storage.lock import held_if_free
from far_runtime.storage.run_record import check_claim, claim, read

PLAN, ENGINE = "sample.json", "engine.json"


@dataclass(frozen=True)
class Folder:
    """`path` holds sample.json (what is drawn), engine.json (by what, unless engines are mixed) and the shards that are
    finished, each whole: it is written aside, flushed to the disk, and then renamed."""

    path: Path
    plan: Plan

    @contextmanager
    def opened(self, facts: Mapping[str, Any]) -> Iterator[None]:
        """Nobody else writes in the folder meanwhile. FarError where somebody does, and where the folder is of another
        run; what a killed run left half-written is cleared away, and which engine it had, where no shard is there."""
        check_folder(self.path)
        with held_if_free(self.path / ".lock") as free:
            if not free:
                raise FarError(f"{self.path}: another far sample is at work there; wait for it, or choose another -o")
            claim(self.path / PLAN, facts)
            for part in self.path.glob(".*.part"):
                part.unlink(missing_ok=True)
            if not any(self._is_whole(shard) for shard in self.plan.shards):
                (self.path / ENGINE).unlink(missing_ok=True)  # of a run that ended before its first shard was there
            yield

    def missing(self) -> tuple[list[Shard], list[str]]:
        """Shards that are not there, and the names of files that are damaged, whose shards are counted to them."""
        shards, damaged = [], []
        for shard in self.plan.shards:
            if self._is_whole(shard):
                continue
            shards.append(shard)
            if (self.path / self.plan.name(shard)).exists():
                damaged.append(self.plan.name(shard))
        return shards, damaged

    def _is_whole(self, shard: Shard) -> bool:
        return found_keys(self.plan.format, self.path / self.plan.name(shard)) == self.plan.keys(shard)

    def write(self, made: Made) -> None:
        """Write a shard; FarError where it cannot be, and where it is by another engine than the ones before."""
        if not self.plan.mixed:
            claim(self.path / ENGINE, made.engine)
        with whole_file(self.path / self.plan.name(made.shard)) as aside, aside.open("wb") as file:
            file.write(made.data)
            file.flush()
            os.fsync(file.fileno())

    def check_engine(self, engine: Mapping[str, Any]) -> None:
        """FarError for another engine than that of the pictures that are there, unless engines are mixed."""
        if not self.plan.mixed:
            check_claim(self.path / ENGINE, engine)

    @property
    def engine(self) -> dict[str, Any] | None:
        """What drew the pictures that are there; None where there are none, or engines are mixed."""
        return None if self.plan.mixed else read(self.path / ENGINE)
