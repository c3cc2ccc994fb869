"""The engine cache: engines that were compiled from a bundle, by keys that hold everything that they depend on."""

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

# EEXIST: a file has the name of the folder.
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST)
FULL = (errno.ENOSPC, errno.EDQUOT)
GIGA = 1e9
Report = Callable[[str], None]


class EngineCache:
    """The compiled engines of one bundle.

    They are written to the bundle's folder `engines`, or to the user's cache folder where the bundle is read-only; both
    are read. An engine appears whole or not at all, and a lock lets one process at a time build it.
    """

    def __init__(self, bundle: Bundle, report: Report = lambda line: None) -> None:
        self.bundle = bundle
        self._report = report

    @property
    def places(self) -> tuple[Path, Path]:
        """The folder in the bundle, and the user's for this bundle's content."""
        return self.bundle.path / ENGINES_FOLDER, user_cache() / "engines" / self.bundle.manifest.id

    def find(self, key: EngineKey) -> CachedEngine | None:
        """The engine of this key; None where there is none, or its sidecar or the SHA-256 of a file is wrong."""
        for place in self.places:
            engine = read_engine(place / key.folder)
            if not engine.problem and engine.library == key.library and engine.facts == to_json(key.facts):
                return engine
        return None

    def build(self, key: EngineKey, write: Callable[[Path], Mapping[str, Any] | None]) -> CachedEngine:
        """The engine of this key, built where there is none.

        write: puts the engine's files into a folder, and may return notes for the sidecar.
        Of two processes that ask for the same engine, one builds it and the other waits for it. What killed processes
        left behind is cleared first. Raises FarError for a full disk, where no folder can be written to, and where the
        bundle is replaced meanwhile.
        """
        if (engine := self.find(key)) is not None:
            return engine
        place = self._writable()
        with held(place / f".{key.folder}.lock", lambda: self._report(f"another process builds {key.folder}: waiting")):
            if (engine := self.find(key)) is not None:
                return engine
            self._clear_leftovers(place, key.folder)
            return self._write(key, place, write)

    def entries(self, check: bool = True) -> list[CachedEngine]:
        """The engines in both folders, the newest first, damaged ones with their problem.

        check: compare the SHA-256 of every file, not only its size.
        """
        engines = [
            read_engine(path, check)
            for place in self.places
            if place.is_dir()
            for path in sorted(place.iterdir())
            if ENGINE_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]
        return sorted(engines, key=lambda engine: -engine.created)

    def remove(self, engine: CachedEngine) -> None:
        """Delete one engine, after a build of it that may be going on; other processes see it whole or not at all."""
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
                if error.errno not in NOT_WRITABLE:
                    raise
                refused.append(f"{place} ({error.strerror})")
        raise FarError(
            f"no place for engines: {' and '.join(refused)} cannot be written; set XDG_CACHE_HOME to a folder of yours"
        )

    def _write(self, key: EngineKey, place: Path, write: Callable[[Path], Mapping[str, Any] | None]) -> CachedEngine:
        target = place / key.folder
        # A link is the user's: only the link goes, never the folder that it leads to.
        if target.is_symlink():
            target.unlink()
        # An engine that stands there is a damaged one, which goes.
        with whole_folder(target, check_replaceable=lambda _: None) as folder:
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
            # After the build: an error of the build comes first.
            self._check_unchanged()
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

    def _clear_leftovers(self, place: Path, locked: str = "") -> None:
        """Remove unfinished folders that no process works on. locked: the engine whose lock this process holds."""
        for path in _unfinished(place):
            if _engine_name(path) == locked:
                _delete(path)
                continue
            with held_if_free(place / f".{_engine_name(path)}.lock") as free:
                if free:
                    _delete(path)


def _unfinished(place: Path) -> Iterator[Path]:
    for path in sorted(place.iterdir()):
        if UNFINISHED.fullmatch(path.name) and not path.is_symlink():
            yield path


def _engine_name(path: Path) -> str:
    """Name of the engine that an unfinished folder is of: the first part of ".NAME.PROCESS-abc.part" or ".NAME.old"."""
    return path.name.split(".")[1]


def _is_free(path: Path) -> bool:
    try:
        with held_if_free(path.with_name(f".{_engine_name(path)}.lock")) as free:
            return free
    except OSError:
        # Where no lock can be written, nothing can be removed either.
        return False


def _discard(path: Path) -> None:
    """Remove a folder that other processes may read: it is renamed first, so that none of them sees half of it."""
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
