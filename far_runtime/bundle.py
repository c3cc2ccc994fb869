"""The bundle: a folder with a manifest, ONNX graphs and one weight file, checked by SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from far_runtime.errors import FarError
from far_runtime.model_info import ModelInfo, model_info
from far_runtime.storage.atomic import whole_file

FORMAT = 6
"""Of the manifests that are written."""

OLDEST_FORMAT = 5
"""The oldest format that is still read, with all between it and FORMAT."""

MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
ENGINES_FOLDER = "engines"
"""Folder in a bundle for what was compiled from it; no part of the bundle itself."""

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
CALIBRATION_PICTURES = 16
"""Pictures that INT8 is calibrated on unless `far export --calibrate` says another number."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy dtype and shape of a graph's input or output; a text in the shape names an axis of any length."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX file. `constants`: what is folded into it (empty: everything is an input). `tolerance`: the relative
    error to the torch model that verify accepts. `flops`: arithmetic of one row as a polynomial in the sizes of its
    axes: the coefficient of every term, named by its axes ("": the constant, "count count": the square of `count`).
    profile: smallest, usual and largest size of every dynamic axis, for engines that are compiled for them. precision:
    of its matrix products.
    """

    name: str
    stage: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: float
    constants: dict[str, int] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    profile: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    precision: str = "fp32"


def fits(folded: Mapping[str, int], constants: Mapping[str, int]) -> bool:
    """Whether a graph that has `folded` in it computes what these constants ask for."""
    return all(constants.get(name) == value for name, value in folded.items())


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says. `model`: the network's sizes and settings; `default_settings`: the sampling settings
    that are used by default; `presets`: those that far tune found, by name, each {"settings", "measured"}; `classes`:
    names by label, or empty; `source`: the checkpoint files; `precision`: what it was exported in, one of PRECISIONS
    (single graphs may keep a higher one).
    """

    system: str
    model: ModelInfo
    default_settings: dict[str, Any]
    graphs: tuple[Graph, ...]
    files: dict[str, FileRecord]
    classes: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    created_by: str = ""
    precision: str = "fp32"
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def graph(self, stage: str, constants: Mapping[str, int]) -> Graph:
        """The graph of a stage that has these constants folded in, or the one that takes them as inputs; FarError
        if none."""
        of_stage = [graph for graph in self.graphs if graph.stage == stage]
        for graph in of_stage:
            if fits(graph.constants, constants):
                return graph
        wanted = ", ".join(f"{name} {value}" for name, value in constants.items())
        have = "; ".join(", ".join(f"{k} {v}" for k, v in graph.constants.items()) for graph in of_stage)
        raise FarError(
            f"the bundle has no {stage} graph for {wanted or 'it'} (it has: {have or 'none'}); "
            "use the levels that it was exported for, or export it with --levels shared"
        )

    def has_stage(self, name: str) -> bool:
        """Whether the bundle has a graph of that stage."""
        return any(graph.stage == name for graph in self.graphs)

    @property
    def smallest_batch(self) -> int:
        """The fewest pictures that all graphs were exported for; 1 where none says how many."""
        return max((graph.profile["batch"][0] for graph in self.graphs if "batch" in graph.profile), default=1)

    @property
    def largest_batch(self) -> int:
        """The most pictures that all graphs were exported for; 1 where none says how many."""
        return min((graph.profile["batch"][2] for graph in self.graphs if "batch" in graph.profile), default=1)

    @property
    def id(self) -> str:
        """Sixteen hex digits that name the content of the bundle: its graphs and weights."""
        digest = hashlib.sha256("".join(f"{name} {self.files[name].sha256}\n" for name in sorted(self.files)).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder and its manifest."""

    path: Path
    manifest: Manifest


def open_bundle(path: str | Path, check: bool = True) -> Bundle:
    """Read a bundle and, unless check=False, compare every file with its checksum.

    Raises FarError for a folder without a manifest, a newer format, a missing file, a changed byte (naming the file),
    and a file name that leads out of the bundle.
    """
    folder = Path(path)
    bundle = Bundle(folder, read_manifest(folder))
    for name, record in bundle.manifest.files.items():
        _check_file(folder, name, record, check)
    if (folder / WEIGHTS).exists() and WEIGHTS not in bundle.manifest.files:
        raise FarError(f"{folder / MANIFEST}: has no checksum of {WEIGHTS}; export the bundle again")
    for graph in bundle.manifest.graphs:
        if graph.file not in bundle.manifest.files:
            raise FarError(
                f"{folder / MANIFEST}: graph {graph.name} is in {graph.file}, which has no checksum; export the "
                f"bundle again"
            )
    return bundle


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, its own checksum compared and no file's; FarError where there is none of ours."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise FarError(f"{folder}: no such bundle; make one with: far export CHECKPOINT --vae VAE -o {folder}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FarError(
            f"{folder}: no {MANIFEST}, so it is no bundle; make one with: far export CHECKPOINT --vae VAE -o BUNDLE"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FarError(f"{file}: cannot be read ({error}); export the bundle again") from error
    version = data.get("format") if isinstance(data, dict) else None
    if not isinstance(version, int) or version < 1:
        raise FarError(f"{file}: no format number in it, so it is no far-deploy manifest; export the bundle again")
    if version < OLDEST_FORMAT:
        raise FarError(
            f"{file}: format {version} of an earlier far-deploy, this one reads {OLDEST_FORMAT} to {FORMAT}; export it "
            "again"
        )
    if version > FORMAT:
        raise FarError(
            f"{file}: format {version}, this far-deploy reads {OLDEST_FORMAT} to {FORMAT}; update it with: "
            "pip install -U far-deploy"
        )
    if data.get("sha256") != manifest_checksum(data):
        raise FarError(f"{file}: changed since export (its checksum is another); export the bundle again")
    try:
        return manifest_from_dict(_upgraded(data, version), str(file))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FarError(
            f"{file}: incomplete or damaged ({type(error).__name__}: {error}); export the bundle again"
        ) from error


def _upgraded(data: Mapping[str, Any], version: int) -> dict[str, Any]:
    """The content of a manifest of an older format, as the present one has it."""
    content = dict(data)
    if version < 6:  # "schedule" was the name of the default settings
        content["default_settings"] = content.pop("schedule")
    return content


def _check_file(folder: Path, name: str, record: FileRecord, check: bool) -> None:
    parts = PurePosixPath(name)
    path = folder / name
    if parts.is_absolute() or ".." in parts.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise FarError(f"{folder / MANIFEST}: file name {name!r} leads out of the bundle; do not use this bundle")
    if not path.is_file():
        raise FarError(f"{path}: missing from the bundle; copy the whole folder, or export it again")
    if path.stat().st_size != record.bytes:
        raise FarError(
            f"{path}: {path.stat().st_size} bytes, expected {record.bytes}; copy the bundle again, or export it again"
        )
    if check and sha256_of(path) != record.sha256:
        raise FarError(
            f"{path}: changed since export (its SHA-256 is not the manifest's); copy the bundle again, or export "
            f"it again"
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256_in_blocks(file)
        )


def _sha256_in_blocks(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file."""
    return FileRecord(path.stat().st_size, sha256_of(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json whole or not at all."""
    content = {"format": FORMAT, **manifest_to_dict(manifest)}
    text = json.dumps({**content, "sha256": manifest_checksum(content)}, indent=1)
    with whole_file(folder / MANIFEST) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def manifest_checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own "sha256" entry left out: of the compact JSON with sorted keys."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_to_dict(manifest: Manifest) -> dict[str, Any]:
    """The JSON form of a manifest, without its format number and checksum."""
    return {**asdict(manifest), "model": manifest.model.to_json()}


def manifest_from_dict(data: Mapping[str, Any], source: str = MANIFEST) -> Manifest:
    """A manifest from its JSON form, which is that of the file `source`; KeyError, TypeError or FarError where
    something is missing or of another type."""
    return Manifest(
        system=data["system"],
        model=model_info(data["system"], data["model"], source),
        default_settings=dict(data["default_settings"]),
        graphs=tuple(_graph(entry) for entry in data["graphs"]),
        files={name: FileRecord(int(entry["bytes"]), str(entry["sha256"])) for name, entry in data["files"].items()},
        classes=tuple(data.get("classes", ())),
        source=dict(data.get("source", {})),
        created_by=data.get("created_by", ""),
        precision=_precision(data),
        presets={name: _preset(entry) for name, entry in data.get("presets", {}).items()},
    )


def _preset(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"settings": dict(entry["settings"]), "measured": dict(entry["measured"])}


def _graph(entry: Mapping[str, Any]) -> Graph:
    def specs(key: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in entry[key])

    return Graph(
        name=entry["name"],
        stage=entry["stage"],
        file=entry["file"],
        inputs=specs("inputs"),
        outputs=specs("outputs"),
        tolerance=float(entry["tolerance"]),
        constants={name: int(value) for name, value in entry.get("constants", {}).items()},
        flops={term: float(value) for term, value in entry.get("flops", {}).items()},
        parameters=int(entry.get("parameters", 0)),
        profile={axis: _sizes(sizes) for axis, sizes in entry["profile"].items()},
        precision=_precision(entry),
    )


def _sizes(sizes: Any) -> tuple[int, int, int]:
    low, usual, high = (int(size) for size in sizes)
    return low, usual, high


def _precision(entry: Mapping[str, Any]) -> str:
    precision = entry["precision"]
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}; known: {', '.join(PRECISIONS)}")
    return str(precision)
