"""`far export-triton`: a folder that a Triton server serves: every stage a model, and the loop a model over them."""

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
from far_runtime.errors import FarError
from far_runtime.model_name import check_name
from far_runtime.sampling.settings import check_system
from far_runtime.storage.atomic import whole_folder
from far_runtime.triton.config import (
    VERSION,
    Backend,
    Serving,
    backend_of,
    loop_config,
    stage_config,
    stage_model,
    text_of,
)
from far_runtime.triton.plans import Plans, plans_of

EDITING = ("encode", "tokenize")
"""Stages that drawing never calls."""

NOT_IN_THE_LOOP = ("__pycache__", "bench", "build", "serve", "cli*.py")
"""What of far_runtime the loop's copy is without."""

SATURATION = (
    "warning: on x86-64 without VNNI, sums of INT8 products overflow under Triton, whose backend cannot be told to "
    "take ONNX Runtime's slower kernels; serve there from an export with --precision fp32, or on a processor with VNNI"
)
CONFIG = "config.pbtxt"
LOOP = '''"""The sampling loop of {name}, over the models {name}_*. Written by far export-triton."""

from far_runtime.triton.model import TritonPythonModel as TritonPythonModel
'''

Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to write. name: of the loop's model, and the beginning of the stages'; "": the bundle's folder's. engine:
    one of BACKENDS. plans: the TensorRT engine's name; None: the newest. copy: a copy of the weights in every model,
    in place of links to one of them. runtime: a copy of far_runtime beside the loop. editing: also the stages that
    drawing never calls."""

    name: str = ""
    engine: str = "onnxruntime"
    plans: str | None = None
    copy: bool = False
    runtime: bool = True
    editing: bool = False
    serving: Serving = field(default_factory=Serving)


def write_repository(bundle: Bundle, target: Path, options: Options, report: Report = lambda line: None) -> str:
    """Write a model repository of a bundle; returns the loop's name. The folder appears whole or not at all.

    report: called with a line for the user. Raises FarError for a name or an engine that cannot be, a precision that
    the engine does not compute, plans that were not built, and a folder that is there already.
    """
    check_system(bundle)
    name = options.name or bundle.path.resolve().name
    check_name(name, "--name NAME")
    backend = backend_of(options.engine)
    check_precision(bundle, backend)
    plans = plans_of(bundle, options.plans) if backend.library == "tensorrt" else None
    serving = fitted(bundle, options.serving, plans)
    if plans is not None:
        report(plans.line)
    if bundle.manifest.precision == "int8" and backend.kind == "KIND_CPU":
        report(SATURATION)
    graphs = [graph for graph in bundle.manifest.graphs if options.editing or graph.stage not in EDITING]
    files = Files(options.copy)
    with whole_folder(target) as folder:
        for graph in graphs:
            model = stage_model(name, graph)
            config = stage_config(model, graph, backend, serving, plans.profiles(graph.name) if plans else 1)
            version = _model(folder, model, text_of(config))
            _put(bundle, graph, backend, plans, files, version)
        version = _model(folder, name, text_of(loop_config(name, bundle.manifest, backend, serving)))
        (version / "model.py").write_text(LOOP.format(name=name), encoding="utf-8")
        shutil.copyfile(bundle.path / MANIFEST, version / MANIFEST)
        if TOKENIZER in bundle.manifest.files:
            shutil.copyfile(bundle.path / TOKENIZER, version / TOKENIZER)
        if options.runtime:
            source = Path(far_runtime.__file__).parent
            shutil.copytree(source, version / source.name, ignore=shutil.ignore_patterns(*NOT_IN_THE_LOOP))
    report(files.line)
    report(f"{target}: {len(graphs)} stages and the loop {name}, which draws up to {serving.largest} pictures at once")
    return name


def check_precision(bundle: Bundle, backend: Backend) -> None:
    """FarError where the backend does not compute the bundle's precision."""
    if bundle.manifest.precision == "bf16" and backend.name == "onnxruntime":
        raise FarError(
            f"{bundle.path}: is in BF16, for which onnxruntime has no kernels on the CPU; use --engine "
            "onnxruntime:cuda or tensorrt, or export the bundle with --precision fp16 or fp32"
        )


def fitted(bundle: Bundle, serving: Serving, plans: Plans | None) -> Serving:
    """With no more pictures at once than the graphs were exported for, or their plans built."""
    built = [plans.largest] if plans else []
    return replace(serving, largest=min(serving.largest, bundle.manifest.largest_batch, *built))


def _model(folder: Path, name: str, config: str) -> Path:
    """Make a model's folder with its configuration; returns the folder of its one version."""
    version = folder / name / str(VERSION)
    version.mkdir(parents=True)
    (folder / name / CONFIG).write_text(config, encoding="utf-8")
    return version


def _put(bundle: Bundle, graph: Graph, backend: Backend, plans: Plans | None, files: Files, version: Path) -> None:
    """A graph's file under the name that Triton looks for; weights under the name that the graph calls them by, which
    ONNX Runtime looks for beside the graph."""
    if plans is not None:
        plans.engine.read(graph.name)  # its checksum
        files.put(plans.engine.file(graph.name), version / backend.file)
        return
    files.put(bundle.path / graph.file, version / backend.file)
    if WEIGHTS in bundle.manifest.files and WEIGHTS.encode() in (bundle.path / graph.file).read_bytes():
        files.put(bundle.path / WEIGHTS, version / WEIGHTS)


class Files:
    """Puts files into the repository. One that several models need is copied once; the others get hard links to that
    copy, or, where they are not wanted or the file system has none, copies too.

    Links within the repository alone: a bundle whose own weights had a second name would be refused by onnx, which
    takes that for an attack. No symbolic links: ONNX Runtime (from 1.24 on) does not follow them out of a model's
    folder.
    """

    def __init__(self, copy: bool) -> None:
        self._copy = copy
        self._first: dict[Path, Path] = {}
        self._linked = self._written = 0

    @property
    def line(self) -> str:
        """What was done."""
        linked = f", {self._linked / 1e6:.1f} MB more as hard links" if self._linked else ""
        return f"{self._written / 1e6:.1f} MB of models written{linked}"

    def put(self, source: Path, target: Path) -> None:
        """Make `target` a file of the same content."""
        size = source.stat().st_size
        first = self._first.get(source)
        if first is not None and not self._copy:
            with contextlib.suppress(OSError):
                os.link(first, target)
                self._linked += size
                return
        shutil.copyfile(source, target)
        self._first[source] = target
        self._written += size
