"""Large arrays as files of equally many rows, written in any order by several processes, read by memory-mapping."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_models.pictures import load_array
from far_runtime.errors import FarError
from far_runtime.storage.atomic import whole_file
from far_training.data.cache import write_json

ROWS = 2048
OPEN = 256
"""Shards that are mapped at a time: each holds a file open, of which a process may have 1024."""
BEGUN = "begun.json"


def begin(out: Path, facts: Mapping[str, Any]) -> Path:
    """The folder beside `out` that shards are written to, new or of a run that was ended.

    FarError where `out` exists, or what was begun is of other `facts`.
    """
    if out.exists():
        raise FarError(f"{out}: exists already; remove it or choose another -o folder")
    staging = out.with_name(f".{out.name}.part")
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FarError(
            f"{out}: cannot be written ({error.strerror}); free some space or choose another -o folder"
        ) from error
    path = staging / BEGUN
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != dict(facts):
        raise FarError(f"{staging}: what was begun there is of other pictures, models or settings; remove it")
    with whole_file(path) as aside:
        write_json(aside, dict(facts))
    return staging


def finish(staging: Path, out: Path) -> None:
    """Put a folder whose shards are all there in its place."""
    (staging / BEGUN).unlink()
    for left in staging.glob(".*.part"):  # of a process that was killed
        left.unlink()
    try:
        os.replace(staging, out)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise FarError(f"{out}: cannot be written ({error.strerror}); choose another -o folder") from error


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.npy"


def write_shards(
    folder: Path,
    count: int,
    rows: int,
    read: Callable[[NDArray[np.int64]], NDArray[Any]],
    encode: Callable[[NDArray[Any]], NDArray[Any]],
    batch: int,
    say: Callable[[str], None],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write the shards of process `rank` of `world` that are missing.

    A row of the array is encode(read(its number)), `batch` at a time; a batch is read while the one before is encoded.
    """
    for number in range(rank, -(-count // rows), world):
        path = shard_file(folder, number)
        if path.exists():
            continue
        end = min((number + 1) * rows, count)
        places = np.arange(number * rows, end)
        parts = [encode(each) for each in read_ahead(places, batch, read)]
        with whole_file(path) as aside, aside.open("wb") as file:
            np.save(file, np.concatenate(parts))
        say(f"{end} of {count} pictures")


def read_ahead(
    places: NDArray[np.int64], batch: int, read: Callable[[NDArray[np.int64]], NDArray[Any]]
) -> Iterator[NDArray[Any]]:
    """What is read at the places, a batch at a time, the next one by a thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, places[:batch])
        for start in range(batch, len(places) + batch, batch):
            ready, ahead = ahead, pool.submit(read, places[start : start + batch]) if start < len(places) else ahead
            yield ready.result()


class Shards:
    """The rows of an array [count, ...] in a folder's shards, each mapped when it is first read."""

    def __init__(self, folder: Path, count: int, rows: int, command: str = "cache-latents") -> None:
        """FarError where a shard is missing or the first one is of another length. command: of far train, that makes
        the folder."""
        self.folder, self.count, self._rows = folder, count, rows
        self._open: dict[int, NDArray[Any]] = {}
        missing = [path for i in range(-(-count // rows)) if not (path := shard_file(folder, i)).is_file()]
        if missing:
            raise FarError(f"{missing[0]}: no such file; make {folder} again with far train {command}")
        self.shape, self.dtype = (count, *self._shard(0).shape[1:]), self._shard(0).dtype

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of some rows [n, ...]."""
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        numbers = rows // self._rows
        for number in np.unique(numbers):
            own = numbers == number
            found[own] = self._shard(int(number))[rows[own] - number * self._rows]
        return found

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Row numbers and rows, a shard at a time."""
        for start in range(0, self.count, self._rows):
            rows = np.arange(start, min(start + self._rows, self.count))
            yield rows, self._shard(start // self._rows)

    def _shard(self, number: int) -> NDArray[Any]:
        if number not in self._open:
            path = shard_file(self.folder, number)
            shard = load_array(path)
            wanted = min(self._rows, self.count - number * self._rows)
            if len(shard) != wanted or (self._open and shard.shape[1:] != self.shape[1:]):
                raise FarError(f"{path}: {list(shard.shape)}; expected {wanted} rows; make {self.folder} again")
            if len(self._open) >= OPEN:
                del self._open[next(iter(self._open))]
            self._open[number] = shard
        return self._open[number]
