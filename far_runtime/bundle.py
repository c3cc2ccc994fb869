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
"""Number of the format in which manifests are written."""

OLDEST_FORMAT = 5
"""Number of the oldest format that is read, with all between it and FORMAT."""

MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
ENGINES_FOLDER = "engines"
"""Folder in a bundle for what was compiled from it; no part of the bundle itself."""

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
CALIBRATION_PICTURES = 16
"""Pictures that INT8 is calibrated on unless `far export --calibrate` says another number."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph."""

    name: str
    dtype: str
    """As NumPy calls it, such as "float32"."""
    shape: tuple[int | str, ...]
    """Its sizes; a text is the name of an axis of any length, such as "batch"."""


@dataclass(frozen=True)
class Graph:
    """One ONNX file of the bundle."""

    name: str
    """Unique in the bundle, such as "transformer_00_level00"."""
    stage: str
    """The stage that it computes, such as "transformer"; a stage may have several graphs."""
    file: str
    """Path of the file, relative to the bundle's folder."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: float
    """Relative error to the torch module that verify accepts."""
    constants: dict[str, int] = field(default_factory=dict)
    """The step's constants that are folded into the graph, by name; the others are inputs."""
    flops: dict[str, float] = field(default_factory=dict)
    """Floating-point operations of one row, as a polynomial in the sizes of its axes: the coefficient of every term by
    the names of its axes. "" is the constant term, "count count" the square of `count`."""
    parameters: int = 0
    """Number of its weights."""
    profile: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Smallest, usual and largest size of every dynamic axis, for engines that are compiled for them."""
    precision: str = "fp32"
    """Precision of its matrix products, one of PRECISIONS."""


def fits(folded: Mapping[str, int], constants: Mapping[str, int]) -> bool:
    """Whether a graph with the constants `folded` into it computes a step with these constants."""
    return all(constants.get(name) == value for name, value in folded.items())


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file of the bundle."""

    bytes: int
    sha256: str
    """In hex."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    system: str
    """Name of the sampling loop, a key of `SAMPLERS`."""
    model: ModelInfo
    """The network's sizes and settings."""
    default_settings: dict[str, Any]
    """The sampling settings that are used where none are given, by name."""
    graphs: tuple[Graph, ...]
    files: dict[str, FileRecord]
    """Every file of the bundle but the manifest, by its path relative to the folder."""
    classes: tuple[str, ...] = ()
    """Name of every class label, or empty."""
    source: dict[str, Any] = field(default_factory=dict)
    """The checkpoint files that the bundle was exported from."""
    created_by: str = ""
    """The version of far-deploy that exported it."""
    precision: str = "fp32"
    """What it was exported in, one of PRECISIONS; single graphs may have a higher precision."""
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The presets that far tune found, by name, each with "settings" and "measured"."""

    def graph(self, stage: str, constants: Mapping[str, int]) -> Graph:
        """The graph of a stage that has these constants folded in, or takes them as inputs; FarError if none does."""
        of_stage = [graph for graph in self.graphs if graph.stage == stage]
        for graph in of_stage:
            if fits(graph.constants, constants):
                return graph
        requested = ", ".join(f"{name} {value}" for name, value in constants.items())
        have = "; ".join(", ".join(f"{k} {v}" for k, v in graph.constants.items()) for graph in of_stage)
        raise FarError(
            f"the bundle has no {stage} graph for {requested or 'it'} (it has: {have or 'none'}); "
            "use the levels that it was exported for, or export it with --levels shared"
        )

    def has_stage(self, name: str) -> bool:
        """Whether the bundle has a graph of that stage."""
        return any(graph.stage == name for graph in self.graphs)

    @property
    def smallest_batch(self) -> int:
        """The fewest pictures that all graphs take at once; 1 where no graph says how many."""
        return max((graph.profile["batch"][0] for graph in self.graphs if "batch" in graph.profile), default=1)

    @property
    def largest_batch(self) -> int:
        """The most pictures that all graphs take at once; 1 where no graph says how many."""
        return min((graph.profile["batch"][2] for graph in self.graphs if "batch" in graph.profile), default=1)

    @property
    def id(self) -> str:
        """Sixteen hex digits that name the content of the bundle: its graphs and weights."""
        digest = hashlib.sha256("".join(f"{name} {self.files[name].sha256}\n" for name in sorted(self.files)).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Bundle:
    """A bundle that is open."""

    path: Path
    """Its folder."""
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
    """The manifest of a folder, compared with its own checksum alone; FarError where there is none."""
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
    """The content of a manifest of an older format, as the present format has it."""
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
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file."""
    return FileRecord(path.stat().st_size, sha256_of(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json whole or not at all."""
    content = {"format": FORMAT, **manifest_to_dict(manifest)}
    text = json.dumps({**content, "sha256": manifest_checksum(content)}, indent=1) + "\n"
    with whole_file(folder / MANIFEST) as aside:
        aside.write_text(text, encoding="utf-8")


def manifest_checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content without the entry "sha256", as compact JSON with sorted keys."""
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
