"""`far export-triton`: a model repository, with a model for every stage and one for the loop that calls them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import far_runtime
from far_runtime.bundle import MANIFEST, WEIGHTS, Bundle, Graph
from far_runtime.conditioning.text import TOKENIZER
from far_runtime.errors import FarError, Message, SettingName
from far_runtime.model_name import check_name
from far_runtime.sampling.settings import check_system
from far_runtime.storage.atomic import whole_folder
from far_runtime.triton.config import (
    VERSION,
    Backend,
    ServingConfig,
    get_backend,
    loop_config,
    stage_config,
    stage_model,
    to_text,
)
from far_runtime.triton.engine_files import EngineFiles, find_engine_files

EDITING_STAGES = ("encode", "tokenize")
"""Stages that drawing never calls."""

NOT_COPIED = ("__pycache__", "bench", "builder", "cli", "sample", "serve")
"""Folders of far_runtime that the loop does not need."""

SATURATION_WARNING = (
    "warning: on x86-64 without VNNI, sums of INT8 products overflow under Triton, whose backend cannot be told to "
    "use ONNX Runtime's slower kernels; serve there from an export with --precision fp32, or on a processor with VNNI"
)
CONFIG = "config.pbtxt"
MODEL_PY = '''"""The sampling loop of {name}, over the models {name}_*. Written by far export-triton."""

from far_runtime.triton.model import TritonPythonModel as TritonPythonModel
'''

Report = Callable[[str], None]
"""Called with a line for the user."""


@dataclass(frozen=True)
class RepositoryOptions:
    """What a model repository holds."""

    name: str = ""
    """Name of the loop's model, and what the stages' names begin with; "" for the name of the bundle's folder."""

    engine: str = "onnxruntime"
    """What runs the stages, one of BACKENDS."""

    plans: str | None = None
    """Name of the TensorRT engine to use; None for the newest."""

    copy: bool = False
    """Whether every model has its own copy of the weights, in place of hard links to one file."""

    runtime: bool = True
    """Whether far_runtime is copied beside the loop."""

    editing: bool = False
    """Whether the stages that drawing never calls are exported too."""

    serving: ServingConfig = field(default_factory=ServingConfig)
    """How Triton runs the models."""


def write_repository(
    bundle: Bundle, target: Path, options: RepositoryOptions, report: Report = lambda line: None
) -> str:
    """Write the model repository of a bundle to a new folder, which appears whole or not at all.

    Returns the name of the loop's model.
    Raises FarError for an invalid name or engine, for a precision that the engine does not compute, if no TensorRT
    engine was built, and if the folder exists.
    """
    check_system(bundle)
    name = options.name or bundle.path.resolve().name
    check_name(name, Message(SettingName("name"), " NAME"))
    backend = get_backend(options.engine)
    check_precision(bundle, backend)
    engine_files = find_engine_files(bundle, options.plans) if backend.library == "tensorrt" else None
    serving = limit_batch(bundle, options.serving, engine_files)
    if engine_files is not None:
        report(engine_files.requirements)
    if bundle.manifest.precision == "int8" and backend.kind == "KIND_CPU":
        report(SATURATION_WARNING)
    graphs = [graph for graph in bundle.manifest.graphs if options.editing or graph.stage not in EDITING_STAGES]
    files = ModelFiles(options.copy)
    with whole_folder(target) as folder:
        for graph in graphs:
            model = stage_model(name, graph)
            profiles = engine_files.profiles(graph.name) if engine_files else 1
            version = _make_model(folder, model, to_text(stage_config(model, graph, backend, serving, profiles)))
            _put_graph(bundle, graph, version / backend.file, engine_files, files)
        version = _make_model(folder, name, to_text(loop_config(name, bundle.manifest, backend, serving)))
        _put_loop(bundle, name, version, options.runtime)
    report(files.summary)
    report(
        f"{target}: {len(graphs)} stages and the loop {name}, which draws up to {serving.max_batch} pictures at once"
    )
    return name


def check_precision(bundle: Bundle, backend: Backend) -> None:
    """Raise FarError if the backend does not compute the bundle's precision."""
    if bundle.manifest.precision == "bf16" and backend.name == "onnxruntime":
        raise FarError(
            f"{bundle.path}: is in BF16, for which onnxruntime has no kernels on the CPU; use ",
            SettingName("engine"),
            " onnxruntime:cuda or tensorrt, or export the bundle with --precision fp16 or fp32",
        )


def limit_batch(bundle: Bundle, serving: ServingConfig, engine_files: EngineFiles | None) -> ServingConfig:
    """The same with no larger batch than the graphs and the engine files take."""
    built = [engine_files.max_batch] if engine_files else []
    return replace(serving, max_batch=min(serving.max_batch, bundle.manifest.largest_batch, *built))


def _make_model(folder: Path, name: str, config: str) -> Path:
    """Make a model's folder with its configuration; returns the folder of its only version."""
    version = folder / name / str(VERSION)
    version.mkdir(parents=True)
    (folder / name / CONFIG).write_text(config, encoding="utf-8")
    return version


def _put_graph(bundle: Bundle, graph: Graph, target: Path, engine_files: EngineFiles | None, files: ModelFiles) -> None:
    """Put a graph, or its TensorRT engine file, into a version folder, and the weights beside the graph, where ONNX
    Runtime looks for them."""
    if engine_files is not None:
        engine_files.engine.read(graph.name)  # compares its checksum
        files.put(engine_files.engine.file(graph.name), target)
        return
    files.put(bundle.path / graph.file, target)
    if WEIGHTS in bundle.manifest.files and WEIGHTS.encode() in (bundle.path / graph.file).read_bytes():
        files.put(bundle.path / WEIGHTS, target.with_name(WEIGHTS))


def _put_loop(bundle: Bundle, name: str, version: Path, runtime: bool) -> None:
    """Write the loop's files; runtime: whether far_runtime is among them."""
    (version / "model.py").write_text(MODEL_PY.format(name=name), encoding="utf-8")
    shutil.copyfile(bundle.path / MANIFEST, version / MANIFEST)
    if TOKENIZER in bundle.manifest.files:
        shutil.copyfile(bundle.path / TOKENIZER, version / TOKENIZER)
    if runtime:
        package = Path(far_runtime.__file__).parent
        shutil.copytree(package, version / package.name, ignore=shutil.ignore_patterns(*NOT_COPIED))


class ModelFiles:
    """Copies files into the repository; further copies of the same file become hard links to the first.

    Links never lead to the bundle's own files: onnx refuses weights with a second name, which it takes for an attack.
    Symbolic links would not do: ONNX Runtime (from 1.24 on) does not follow them out of a model's folder.

    copy: whether to write copies in place of links, as is done on file systems without hard links.
    """

    def __init__(self, copy: bool) -> None:
        self._copy = copy
        self._first_copies: dict[Path, Path] = {}
        self._linked_bytes = self._written_bytes = 0

    @property
    def summary(self) -> str:
        """How much was written, as a line for the user."""
        linked = f", {self._linked_bytes / 1e6:.1f} MB more as hard links" if self._linked_bytes else ""
        return f"{self._written_bytes / 1e6:.1f} MB of models written{linked}"

    def put(self, source: Path, target: Path) -> None:
        """Make `target` a file with the content of `source`."""
        size = source.stat().st_size
        first_copy = self._first_copies.get(source)
        if first_copy is not None and not self._copy:
            with contextlib.suppress(OSError):
                os.link(first_copy, target)
                self._linked_bytes += size
                return
        shutil.copyfile(source, target)
        self._first_copies[source] = target
        self._written_bytes += size
