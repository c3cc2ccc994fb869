"""An engine in the cache: its key, and the sidecar file that describes it with facts and checksums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from far_runtime import __version__
from far_runtime.bundle import Bundle, FileRecord, manifest_checksum, record_of
from far_runtime.errors import FarError

SIDECAR = "engine.json"
FORMAT = 1
DIGITS = 16
ENGINE_NAME = re.compile(r"[a-z0-9_-]+-[0-9a-f]{16}")
"""Names of engines' folders. Whatever else lies beside them belongs to the user, and is neither shown nor removed."""
UNFINISHED = re.compile(rf"\.({ENGINE_NAME.pattern})\.(([0-9]+-\w+\.)?old|[0-9]+(-\w+)?\.part)")
"""Names of folders that a killed build or removal leaves behind."""
TYPES: dict[str, type | tuple[type, ...]] = {
    "library": str, "facts": dict, "created": (int, float), "created_by": str, "seconds": (int, float), "notes": dict,
}  # fmt: skip
FACT_TYPES: dict[str, type] = {
    "version": str, "precision": str, "device": str, "compute_capability": str, "targets": list, "flags": dict,
}  # fmt: skip
"""Types of the facts that `far inspect` shows."""


@dataclass(frozen=True)
class EngineKey:
    """Everything that a compiled engine depends on."""

    library: str
    """The engine library, such as "tensorrt"."""
    facts: Mapping[str, Any]
    """JSON values by name. `far inspect` shows those of `bundle_facts`, "version" (of the library), "device" and
    "compute_capability" or "targets" (compute capabilities), and "flags" (options that change the engine)."""

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
        "profiles": to_json({graph.name: graph.profile for graph in manifest.graphs}),
    }


@dataclass(frozen=True)
class CachedEngine:
    """One folder of the cache, as its sidecar describes it."""

    path: Path
    """The folder."""
    library: str = ""
    """The engine library, such as "tensorrt"."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the engine depends on, as in `EngineKey`."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    """Size and SHA-256 of every file, by its path in the folder."""
    created: float = 0.0
    """When the build began, in seconds since 1970."""
    created_by: str = ""
    """The version of far-deploy that built it."""
    seconds: float = 0.0
    """How long the build took."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """The builder's figures on each graph (memory, say), by the graph's name."""
    problem: str = ""
    """Why the engine must not be loaded; empty where it may be."""

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
        data = self.file(graph).read_bytes()
        self.check(graph, data)
        return data

    def check(self, graph: str, data: Any) -> None:
        """FarError unless the bytes (any contiguous buffer) of one graph's file have the sidecar's SHA-256."""
        name = self._file(graph)
        if hashlib.sha256(data).hexdigest() != self.files[name].sha256:
            raise FarError(f"{self.path / name}: changed since it was built; remove it with: far clean, build it again")

    def _file(self, graph: str) -> str:
        for name in self.files:
            if PurePosixPath(name).stem == graph:
                return name
        raise FarError(f"{self.path}: holds nothing for graph {graph}; remove it with: far clean, build it again")


def read_engine(path: Path, check: bool = True) -> CachedEngine:
    """Read an engine's folder; `problem` says what is wrong with it.

    check: compare the SHA-256 of every file, not only its size.
    """
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
        about: dict[str, Any] = {name: _typed(data, name, type_) for name, type_ in TYPES.items()}
        for name in FACT_TYPES.keys() & about["facts"].keys():
            _typed(about["facts"], name, FACT_TYPES[name])
        "".join(about["facts"].get("targets", []))
    except (KeyError, TypeError, AttributeError) as error:
        return CachedEngine(path, problem=f"damaged: {SIDECAR} is incomplete ({error})")
    engine = CachedEngine(path, files=files, **about)
    if EngineKey(engine.library, engine.facts).folder != path.name:
        return replace(engine, problem="renamed: its name is not its key's")
    return replace(engine, problem=_damage(engine, check))


def _typed(data: Mapping[str, Any], name: str, type_: type | tuple[type, ...]) -> Any:
    """The value of a name; TypeError where it is of another type."""
    value = data[name]
    if not isinstance(value, type_):
        raise TypeError(f"{name} is {value!r}"[:80])
    return value


def is_cache_file(name: str) -> bool:
    """Whether a name in a bundle's folder of engines is one that the cache gives."""
    return any(re.fullmatch(pattern, name) for pattern in (ENGINE_NAME, UNFINISHED, rf"\.{ENGINE_NAME.pattern}\.lock"))


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


def size_of(path: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def to_json(content: Any) -> Any:
    """A value as it comes back from JSON: tuples become lists."""
    return json.loads(json.dumps(content))


def write_sidecar(folder: Path, key: EngineKey, created: float, seconds: float, notes: Mapping[str, Any]) -> None:
    """Describe the files of a folder in its sidecar: they were built under `key`, from `created` (seconds since 1970)
    on, in `seconds`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "format": FORMAT,
        "library": key.library,
        "digest": key.digest,
        "facts": to_json(key.facts),
        "files": {path.relative_to(folder).as_posix(): asdict(record_of(path)) for path in files},
        "created": created,
        "created_by": f"far-deploy {__version__}",
        "seconds": seconds,
        "notes": to_json(notes),
    }
    content["sha256"] = manifest_checksum(content)
    (folder / SIDECAR).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
