"""Large arrays as files of equally many rows, written in any order by several processes, read by memory-mapping."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_models.pictures import load_array
from far_runtime.errors import FarError, SettingName
from far_runtime.storage.atomic import check_new_folder, remove_parts, whole_file
from far_runtime.storage.run_record import claim
from far_training.loop.display import Log
from far_training.loop.processes import ALONE, ProcessGroup

ROWS = 2048
MAX_OPEN = 256
"""Shards that are mapped at a time. Each of them keeps a file open, of which a process may have 1024."""
FACTS = "begun.json"
"""In an unfinished folder: what its shards are made of."""


@dataclass(frozen=True)
class ShardedArray:
    """An array [count, ...] whose rows are computed a batch at a time."""

    count: int
    """Rows of the array."""
    rows: int
    """Rows of a shard; the last shard may have fewer."""
    read: Callable[[NDArray[np.int64]], NDArray[Any]]
    """read(row numbers [n]): what `encode` needs for these rows; it runs in a thread, one batch ahead."""
    encode: Callable[[NDArray[Any]], NDArray[Any]]
    """encode(what was read): the rows [n, ...]."""
    batch: int
    """Rows that are computed at a time."""


@contextmanager
def sharded_folder(
    out: Path, facts: Mapping[str, Any], array: ShardedArray, log: Log, group: ProcessGroup
) -> Iterator[Path | None]:
    """Write the shards of an array, which the processes share; the folder appears as `out` after the block, whole.

    The block gets the unfinished folder in the main process, to write the rest, and None in the others. The shards of
    an interrupted run with the same `facts` are kept. FarError where `out` exists already, or other facts were begun.
    """
    staging = begin_folder(out, facts)
    write_shards(staging, array, log, group)
    group.wait()
    yield staging if group.is_main else None
    if group.is_main:
        finish_folder(staging, out)


def begin_folder(out: Path, facts: Mapping[str, Any]) -> Path:
    """The folder beside `out` that shards are written to, new or left by an interrupted run.

    FarError where `out` exists already, or the interrupted run had other `facts`.
    """
    check_new_folder(out)
    staging = out.with_name(f".{out.name}.part")
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FarError(
            f"{out}: cannot be written ({error.strerror}); free some space or choose another folder with ",
            SettingName("output"),
        ) from error
    claim(staging / FACTS, facts)
    return staging


def finish_folder(staging: Path, out: Path) -> None:
    """Put a folder that has all its shards in its place."""
    (staging / FACTS).unlink()
    remove_parts(staging)
    try:
        os.replace(staging, out)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise FarError(
            f"{out}: cannot be written ({error.strerror}); choose another folder with ", SettingName("output")
        ) from error


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.npy"


def write_shards(folder: Path, array: ShardedArray, log: Log, group: ProcessGroup = ALONE) -> None:
    """Write this process's part of the shards that are missing."""
    for number in range(group.rank, -(-array.count // array.rows), group.world):
        path = shard_file(folder, number)
        if path.exists():
            continue
        end = min((number + 1) * array.rows, array.count)
        parts = [array.encode(batch) for batch in read_ahead(np.arange(number * array.rows, end), array)]
        with whole_file(path) as part, part.open("wb") as file:
            np.save(file, np.concatenate(parts))
        log(f"{end} of {array.count} pictures")


def read_ahead(numbers: NDArray[np.int64], array: ShardedArray) -> Iterator[NDArray[Any]]:
    """What the array reads for these rows, a batch at a time; a thread reads the next batch."""
    batches = [numbers[start : start + array.batch] for start in range(0, len(numbers), array.batch)]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(array.read, batches[0])
        for following in batches[1:]:
            batch, future = future.result(), pool.submit(array.read, following)
            yield batch
        yield future.result()


class Shards:
    """The rows of an array [count, ...] in the shards of a folder, each mapped when it is first read."""

    def __init__(self, folder: Path, count: int, rows: int, command: str = "cache-latents") -> None:
        """FarError where a shard is missing or the first one has another length.

        rows: of a shard. command: of far train, that makes the folder.
        """
        self.folder, self.count, self._rows = folder, count, rows
        self._open: dict[int, NDArray[Any]] = {}
        missing = [path for i in range(-(-count // rows)) if not (path := shard_file(folder, i)).is_file()]
        if missing:
            raise FarError(f"{missing[0]}: no such file; make {folder} again with far train {command}")
        self.shape, self.dtype = (count, *self._shard(0).shape[1:]), self._shard(0).dtype

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of some rows [n, ...]."""
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        numbers = rows // self._rows
        for number in np.unique(numbers):
            inside = numbers == number
            values[inside] = self._shard(int(number))[rows[inside] - number * self._rows]
        return values

    def pick(self, rows: NDArray[np.int64], index: NDArray[Any]) -> NDArray[Any]:
        """From each of some rows [n], the entry `index` [n] of its first axis: [n, ...]."""
        return self[rows][np.arange(len(rows)), index.astype(np.int64)]

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Row numbers and rows, a shard at a time."""
        for start in range(0, self.count, self._rows):
            rows = np.arange(start, min(start + self._rows, self.count))
            yield rows, self._shard(start // self._rows)

    def _shard(self, number: int) -> NDArray[Any]:
        if number not in self._open:
            path = shard_file(self.folder, number)
            shard = load_array(path)
            length = min(self._rows, self.count - number * self._rows)
            if len(shard) != length or (self._open and shard.shape[1:] != self.shape[1:]):
                raise FarError(f"{path}: {list(shard.shape)}; expected {length} rows; make {self.folder} again")
            if len(self._open) >= MAX_OPEN:
                del self._open[next(iter(self._open))]
            self._open[number] = shard
        return self._open[number]


def open_noted_shards(folder: Path, notes: Mapping[str, Any], notes_file: str) -> Shards:
    """The shards of a cache, with `count` and `rows` from its notes; FarError where they lack them."""
    count, rows = notes.get("count"), notes.get("rows")
    if not isinstance(count, int) or not isinstance(rows, int):
        raise FarError(
            f"{folder / notes_file}: lacks count or rows, so an earlier version made it; make it again with far train "
            "cache-latents"
        )
    return Shards(folder, count, rows)
