"""The engine cache: what was compiled from a bundle, under keys that hold all it depends on, beside a checksum."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from far_runtime.bundle import ENGINES_FOLDER, Bundle, open_bundle
from far_runtime.engines.cache.entry import (
    ENGINE_NAME,
    UNFINISHED,
    CachedEngine,
    EngineKey,
    read_engine,
    to_json,
    write_sidecar,
)
from far_runtime.errors import FarError
from far_runtime.storage.atomic import user_cache, whole_folder
from far_runtime.storage.lock import held, held_if_free

NOT_FOR_US = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST)  # the last: a file of that name
FULL = (errno.ENOSPC, errno.EDQUOT)
GIGA = 1e9
Report = Callable[[str], None]


class EngineCache:
    """The compiled engines of one bundle: in its folder `engines`, or in the user's cache folder where that may not be
    written. Both places are read.

    An engine appears whole or not at all: it is written aside, under a lock, and renamed when its sidecar is in it.
    """

    def __init__(self, bundle: Bundle, report: Report = lambda line: None) -> None:
        self.bundle = bundle
        self._report = report

    @property
    def places(self) -> tuple[Path, Path]:
        """The folder in the bundle, and the user's for this bundle's content."""
        return self.bundle.path / ENGINES_FOLDER, user_cache() / "engines" / self.bundle.manifest.id

    def find(self, key: EngineKey) -> CachedEngine | None:
        """The engine under this key, its sidecar and the SHA-256 of every file checked; None if there is no sound
        one."""
        for place in self.places:
            engine = read_engine(place / key.folder)
            if not engine.problem and engine.library == key.library and engine.facts == to_json(key.facts):
                return engine
        return None

    def build(self, key: EngineKey, write: Callable[[Path], Mapping[str, Any] | None]) -> CachedEngine:
        """The engine under this key, made by `write` if there is none: it puts files into the folder that it is given,
        and may return notes for the sidecar.

        Of two processes that ask for the same engine, one builds and the other takes that one. What processes that
        were killed left behind is cleared first. FarError for a full disk, for no place to write to, and where the
        bundle was replaced meanwhile.
        """
        found = self.find(key)
        if found is not None:
            return found
        place = self._writable()
        with held(place / f".{key.folder}.lock", lambda: self._report(f"another process builds {key.folder}: waiting")):
            found = self.find(key)
            if found is not None:
                return found
            self._clear_leftovers(place, key.folder)
            return self._write(key, place, write)

    def entries(self, check: bool = True) -> list[CachedEngine]:
        """Everything in both places, newest first, damaged ones with their problem; check=False compares sizes
        only."""
        found = [
            read_engine(path, check)
            for place in self.places
            if place.is_dir()
            for path in sorted(place.iterdir())
            if ENGINE_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]
        return sorted(found, key=lambda engine: -engine.created)

    def remove(self, engine: CachedEngine) -> None:
        """Delete one engine, at once or not at all for whoever looks; waits for a build of it."""
        with held(engine.path.parent / f".{engine.name}.lock"):
            _discard(engine.path)

    def leftovers(self) -> list[Path]:
        """Unfinished folders of builds whose process is gone."""
        return [path for place in self.places if place.is_dir() for path in _unfinished(place) if _is_free(path)]

    def clear_leftovers(self) -> None:
        """Remove what builds that were killed left behind."""
        for place in self.places:
            if place.is_dir():
                self._clear_leftovers(place)

    def _writable(self) -> Path:
        refused = []
        for place in self.places:
            try:
                if place.parent == self.bundle.path:
                    place.mkdir(exist_ok=True)
                else:
                    place.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=place):
                    return place
            except OSError as error:
                if error.errno in FULL:
                    raise _full(place, error) from error
                if error.errno not in NOT_FOR_US:
                    raise
                refused.append(f"{place} ({error.strerror})")
        raise FarError(
            f"no place for engines: {' and '.join(refused)} cannot be written; set XDG_CACHE_HOME to a folder of yours"
        )

    def _write(self, key: EngineKey, place: Path, write: Callable[[Path], Mapping[str, Any] | None]) -> CachedEngine:
        target = place / key.folder
        if target.is_symlink():  # somebody's own: what it leads to is not replaced
            target.unlink()
        # An engine that stands there is a damaged one, which goes.
        with whole_folder(target, check_replaceable=lambda _: self._check_unchanged()) as folder:
            try:
                started = time.time()
                notes = write(folder) or {}
                write_sidecar(folder, key, started, time.time() - started, notes)
            except OSError as error:
                if error.errno in FULL:
                    raise _full(place, error) from error
                if error.errno == errno.ENOENT and not folder.exists():
                    raise self._replaced() from error
                raise
        return read_engine(target)

    def _check_unchanged(self) -> None:
        """FarError where another bundle has taken this one's place: what was compiled may be of either."""
        try:
            now = open_bundle(self.bundle.path, check=False).manifest.id
        except FarError:
            now = ""
        if now != self.bundle.manifest.id:
            raise self._replaced()

    def _replaced(self) -> FarError:
        return FarError(f"{self.bundle.path}: replaced while an engine was built from it; run the command again")

    def _clear_leftovers(self, place: Path, ours: str = "") -> None:
        """ours: the folder that this process holds the lock of."""
        for path in _unfinished(place):
            if _of(path) == ours:
                _delete(path)
                continue
            with held_if_free(place / f".{_of(path)}.lock") as free:
                if free:
                    _delete(path)


def _unfinished(place: Path) -> Iterator[Path]:
    for path in sorted(place.iterdir()):
        if UNFINISHED.fullmatch(path.name) and not path.is_symlink():
            yield path


def _of(path: Path) -> str:
    """Name of the engine that an unfinished folder is of: the first part of ".NAME.PROCESS-abc.part" or ".NAME.old"."""
    return path.name.split(".")[1]


def _is_free(path: Path) -> bool:
    try:
        with held_if_free(path.with_name(f".{_of(path)}.lock")) as free:
            return free
    except OSError:  # where it cannot be written, it cannot be removed either
        return False


def _discard(path: Path) -> None:
    """Remove a folder that others may look at: first its name, then what is in it."""
    if not path.exists():
        return
    aside = path.with_name(f".{path.name}.old")
    _delete(aside)
    path.rename(aside)
    _delete(aside)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _full(place: Path, error: OSError) -> FarError:
    free = shutil.disk_usage(place).free if place.exists() else 0
    return FarError(
        f"{place}: the disk is full ({error.strerror}; {free / GIGA:.1f} GB free); free some space, with far clean "
        "say, or move the bundle"
    )
