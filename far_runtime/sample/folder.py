"""The folder that a run of `far sample` fills: which shards it has, and which are missing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_runtime.errors import FarError, SettingName
from far_runtime.sample.draw import DrawnShard
from far_runtime.sample.run import SampleRun, Shard
from far_runtime.sample.shards import read_keys
from far_runtime.storage.atomic import check_folder, remove_parts, whole_file
from far_runtime.storage.lock import held_if_free
from far_runtime.storage.run_record import check_claim, claim, read

RUN_FILE, ENGINE_FILE = "sample.json", "engine.json"


@dataclass(frozen=True)
class SampleFolder:
    """A folder with the finished shards of a run, each of them whole, and records of the run and of its engine."""

    path: Path
    """The folder."""

    run: SampleRun
    """What it is filled with."""

    @contextmanager
    def locked(self, facts: Mapping[str, Any]) -> Iterator[None]:
        """Within the block, no other process writes to the folder.

        What a killed run left behind is removed: half-written files, and the record of its engine if no shard is there.

        facts: of the run, as `SampleRun.facts` has them.
        Raises FarError if another process has the lock, or if the folder belongs to another run.
        """
        check_folder(self.path)
        with held_if_free(self.path / ".lock") as free:
            if not free:
                raise FarError(
                    f"{self.path}: another far sample is at work there; wait for it, or choose another ",
                    SettingName("output"),
                )
            claim(self.path / RUN_FILE, facts)
            remove_parts(self.path)
            if not any(self._is_whole(shard) for shard in self.run.shards):
                (self.path / ENGINE_FILE).unlink(missing_ok=True)
            yield

    def missing(self) -> tuple[list[Shard], list[str]]:
        """The shards that are missing or damaged, and the file names of the damaged ones."""
        shards, damaged = [], []
        for shard in self.run.shards:
            if self._is_whole(shard):
                continue
            shards.append(shard)
            if (self.path / self.run.file_name(shard)).exists():
                damaged.append(self.run.file_name(shard))
        return shards, damaged

    def _is_whole(self, shard: Shard) -> bool:
        return read_keys(self.run.format, self.path / self.run.file_name(shard)) == self.run.keys(shard)

    def write(self, drawn: DrawnShard) -> None:
        """Write a shard; raises FarError if it cannot be written, or was drawn by another engine than those before."""
        if not self.run.mixed:
            claim(self.path / ENGINE_FILE, drawn.engine)
        with whole_file(self.path / self.run.file_name(drawn.shard)) as aside, aside.open("wb") as file:
            file.write(drawn.data)
            file.flush()
            os.fsync(file.fileno())

    def check_engine(self, engine: Mapping[str, Any]) -> None:
        """Raise FarError if the folder's shards were drawn by another engine, unless engines may be mixed."""
        if not self.run.mixed:
            check_claim(self.path / ENGINE_FILE, engine)

    @property
    def engine(self) -> dict[str, Any] | None:
        """The engine of the folder's shards; None if there are none, or if engines may be mixed."""
        return None if self.run.mixed else read(self.path / ENGINE_FILE)
