"""The engine cache: what was compiled from a bundle, under keys that hold all it depends on, beside a checksum."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from far_runtime import __version__
from far_runtime.bundle import (
    ENGINES_FOLDER,
    Bundle,
    FileRecord,
    manifest_checksum,
    open_bundle,
    record_of,
)
from far_runtime.engines.lock import held, held_if_free
from far_runtime.errors import FarError

SIDECAR = "engine.json"
FORMAT = 1
DIGITS = 16
NOT_FOR_US = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST)  # the last: a file of that name
FULL = (errno.ENOSPC, errno.EDQUOT)
GIGA = 1e9
OURS = re.compile(r"[a-z0-9_-]+-[0-9a-f]{16}")
"""Names of engines' folders. Whatever else lies beside them is somebody's own, and neither shown nor removed."""
UNFINISHED = re.compile(rf"\.({OURS.pattern})\.([0-9]+\.part|old)")
"""What a build, or a removal, that was killed leaves behind."""
KINDS: dict[str, type | tuple[type, ...]] = {
    "library": str, "facts": dict, "created": (int, float), "created_by": str, "seconds": (int, float), "notes": dict,
}  # fmt: skip
FACT_KINDS: dict[str, type] = {
    "version": str, "precision": str, "device": str, "compute_capability": str, "targets": list, "flags": dict,
}  # fmt: skip
"""Types of what a sidecar says, as far as it is explained."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class EngineKey:
    """What an engine was compiled from, for and with: `facts` is plain JSON and holds everything that it depends on.

    Facts by these names are what `far inspect` explains: those of `bundle_facts`; "version" (of the library);
    "device" and "compute_capability", or "targets" (compute capabilities); "flags" (all that changes what is compiled).
    """

    library: str
    facts: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits of SHA-256 over the compact JSON of library and facts, keys sorted."""
        content = json.dumps({"library": self.library, "facts": self.facts}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:DIGITS]

    @property
    def folder(self) -> str:
        """Name of the folder of everything compiled under this key."""
        return f"{self.library}-{self.digest}"


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """The bundle's part of a key: its precision, the SHA-256 of every graph and of the weights, every shape profile."""
    manifest = bundle.manifest
    return {
        "precision": manifest.precision,
        "files": {name: record.sha256 for name, record in sorted(manifest.files.items())},
        "profiles": _plain({graph.name: graph.profile for graph in manifest.graphs}),
    }


@dataclass(frozen=True)
class CachedEngine:
    """One folder of the cache, as its sidecar describes it. `problem`: why it must not be loaded, or empty.

    created: seconds since 1970; seconds: that the build took; notes: what the builder said of each file (memory, say).
    """

    path: Path
    library: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    created: float = 0.0
    created_by: str = ""
    seconds: float = 0.0
    notes: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def name(self) -> str:
        """Its folder's name, which `far clean` takes."""
        return self.path.name

    @property
    def size(self) -> int:
        """Bytes of the whole folder, whatever is in it."""
        return size_of(self.path)

    def file(self, graph: str) -> Path:
        """The file of one graph; FarError if there is none. `read` also checks what it reads."""
        return self.path / self._file(graph)

    def read(self, graph: str) -> bytes:
        """The file of one graph; FarError unless its bytes have the sidecar's SHA-256."""
        name = self._file(graph)
        data = (self.path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.files[name].sha256:
            raise FarError(f"{self.path / name}: changed since it was built; remove it with: far clean, build it again")
        return data

    def _file(self, graph: str) -> str:
        for name in self.files:
            if PurePosixPath(name).stem == graph:
                return name
        raise FarError(f"{self.path}: holds nothing for graph {graph}; remove it with: far clean, build it again")


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
            if not engine.problem and engine.library == key.library and engine.facts == _plain(key.facts):
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
            if OURS.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
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
        target, folder = place / key.folder, place / f".{key.folder}.{os.getpid()}.part"
        started = time.time()
        try:
            folder.mkdir()
            notes = write(folder) or {}
            content = {
                "format": FORMAT,
                "library": key.library,
                "digest": key.digest,
                "facts": _plain(key.facts),
                "files": {name: {"bytes": record.bytes, "sha256": record.sha256}
                          for name, record in _records(folder).items()},
                "created": started,
                "created_by": f"far-deploy {__version__}",
                "seconds": time.time() - started,
                "notes": _plain(notes),
            }  # fmt: skip
            content["sha256"] = manifest_checksum(content)
            (folder / SIDECAR).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            self._still_the_same()
            _discard(target)  # a damaged one
            folder.rename(target)
        except OSError as error:
            if error.errno in FULL:
                raise _full(place, error) from error
            if error.errno == errno.ENOENT and not folder.exists():
                raise self._replaced() from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return read_engine(target)

    def _still_the_same(self) -> None:
        """FarError where another bundle was put in this one's place: what was compiled may be of either."""
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


def read_engine(path: Path, check: bool = True) -> CachedEngine:
    """An engine's folder by its sidecar; `problem` says what is wrong with it. check=False compares sizes only."""
    try:
        data = json.loads((path / SIDECAR).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return CachedEngine(path, problem=f"no {SIDECAR}")
    except (OSError, ValueError, RecursionError):
        return CachedEngine(path, problem=f"damaged: {SIDECAR} cannot be read")
    if not isinstance(data, dict) or data.get("sha256") != manifest_checksum(data):
        return CachedEngine(path, problem=f"damaged: {SIDECAR} was changed")
    if data.get("format") != FORMAT:
        return CachedEngine(path, problem=f"of another far-deploy ({data.get('created_by', 'unknown')})")
    try:
        files = {name: FileRecord(record["bytes"], record["sha256"]) for name, record in data["files"].items()}
        about: dict[str, Any] = {name: _of_kind(data, name, kind) for name, kind in KINDS.items()}
        for name in FACT_KINDS.keys() & about["facts"].keys():
            _of_kind(about["facts"], name, FACT_KINDS[name])
        "".join(about["facts"].get("targets", []))
    except (KeyError, TypeError, AttributeError) as error:
        return CachedEngine(path, problem=f"damaged: {SIDECAR} is incomplete ({error})")
    engine = CachedEngine(path, files=files, **about)
    if EngineKey(engine.library, engine.facts).folder != path.name:
        return replace(engine, problem="renamed: its name is not its key's")
    return replace(engine, problem=_damage(engine, check))


def _of_kind(data: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = data[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}"[:80])
    return value


def belongs(name: str) -> bool:
    """Whether something in a folder of engines was put there by the cache, by its name."""
    return any(re.fullmatch(pattern, name) for pattern in (OURS, UNFINISHED, rf"\.{OURS.pattern}\.lock"))


def _damage(engine: CachedEngine, check: bool) -> str:
    for name, record in engine.files.items():
        path = engine.path / name
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or path.is_symlink() or not path.is_file():
            return f"damaged: {name} is missing"
        if path.stat().st_size != record.bytes:
            return f"damaged: {name} has {path.stat().st_size} bytes instead of {record.bytes}"
        if check and record_of(path) != record:
            return f"damaged: {name} was changed"
    return ""


def user_cache() -> Path:
    """The user's cache folder of far-deploy: in XDG_CACHE_HOME (LOCALAPPDATA on Windows), or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        home = Path(base) if base else Path.home() / ".cache"
    except RuntimeError as error:  # an account without a home
        raise FarError(f"no folder for engines ({error}); set XDG_CACHE_HOME to a folder of yours") from error
    return home / "far-deploy"


def size_of(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def _plain(content: Any) -> Any:
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(content))


def _records(folder: Path) -> dict[str, FileRecord]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): record_of(path) for path in files}


def _unfinished(place: Path) -> Iterator[Path]:
    for path in sorted(place.iterdir()):
        if UNFINISHED.fullmatch(path.name) and not path.is_symlink():
            yield path


def _of(path: Path) -> str:
    """The engine that an unfinished folder is of: ".NAME.PROCESS.part", ".NAME.old"."""
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
