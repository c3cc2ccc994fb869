"""Calibration: the ranges of the activations that are to be quantised, collected while a bundle draws pictures.

The ordinary pipeline runs on a calibration engine: the FP32 graphs on ONNX Runtime, with these activations as further
outputs. The engine keeps a histogram of each activation, so that memory does not grow with the number of calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from far_runtime.bundle import Bundle, Graph
from far_runtime.conditioning.subjects import spread_subjects
from far_runtime.engines.base import Array, scalar
from far_runtime.errors import FarError
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.settings import resolve_plan

BINS = 2048
"""Bins of a histogram."""

INT8_MAX = 127
"""Largest quantised value: int8 is used symmetrically, without -128."""

OBSERVED_CALLS = 128
"""Most calls of a stage that are observed while a batch is drawn, evenly spaced over its levels and diffusion steps."""

BATCH = 4
SEED = 1 << 20
"""First seed of the calibration pictures, far from the seeds that users and checks take."""


class Histogram:
    """Counts of absolute values in BINS equal bins from 0 to `top`, which doubles whenever a value is larger."""

    def __init__(self) -> None:
        self.top = 0.0
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count the values of an array of any shape; FarError for NaN and infinity."""
        if not values.size:
            return
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max())
        if not np.isfinite(largest):
            raise FarError("calibration met NaN or infinity in the FP32 graphs; far verify says where it begins")
        if self.top == 0:
            self.top = largest
        while largest > self.top:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2
        if self.top == 0:
            self.counts[0] += magnitudes.size
            return
        bins = np.minimum((magnitudes * (BINS / self.top)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(bins, minlength=BINS)

    def range(self) -> float:
        """The value that 127 should stand for: the one with the least mean squared error of rounding and clipping."""
        if self.top == 0:
            return 1.0
        centres = (np.arange(BINS) + 0.5) * (self.top / BINS)
        used = int(np.flatnonzero(self.counts)[-1]) + 1
        best, least = self.top * used / BINS, np.inf
        for bins in np.unique(np.linspace(used * 0.05, used, 160).round().astype(int).clip(1)):
            bound = self.top * int(bins) / BINS
            scale = bound / INT8_MAX
            quantised = np.minimum(np.round(centres / scale), INT8_MAX) * scale
            error = float(self.counts @ (centres - quantised) ** 2)
            if error < least:
                best, least = bound, error
        return best


class CalibrationEngine:
    """Runs a bundle's FP32 graphs on ONNX Runtime's CPU provider and collects histograms of some of their tensors."""

    name = "calibration"
    version = ""

    def __init__(self, bundle: Bundle, tensors: Mapping[str, Collection[str]], every: Mapping[str, int]) -> None:
        """tensors: names of those to observe, by graph. every: n by stage, where every n-th call is observed."""
        try:
            self._ort: Any = importlib.import_module("onnxruntime")
        except ImportError:
            raise FarError(
                "int8 is calibrated with onnxruntime, which is not installed; install it with: "
                "pip install 'far-deploy[cpu]'"
            ) from None
        self._bundle, self._tensors, self._every = bundle, tensors, every
        self._sessions: dict[str, Any] = {}
        self._calls: dict[str, int] = {}
        self.observed: dict[str, int] = {}
        """Number of observed calls by stage."""

        self.histograms = {graph: {name: Histogram() for name in names} for graph, names in tensors.items()}
        """Histograms by graph and tensor."""

    def put(self, array: NDArray[Any]) -> Array:
        return np.ascontiguousarray(array)

    def get(self, array: Array) -> NDArray[Any]:
        host: NDArray[Any] = array
        return host

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        constants = constants or {}
        graph = self._bundle.manifest.graph(stage, constants)
        feeds = {
            spec.name: inputs[spec.name] if spec.name in inputs else scalar(constants[spec.name], np.int64)
            for spec in graph.inputs
        }
        call = self._calls.get(stage, 0)
        self._calls[stage] = call + 1
        names = [spec.name for spec in graph.outputs]
        histograms = {} if call % self._every.get(stage, 1) else self.histograms.get(graph.name, {})
        inner = [name for name in histograms if name not in feeds and name not in names]
        arrays = self._session(graph).run([*names, *inner], feeds)
        tensors = {**feeds, **dict(zip([*names, *inner], arrays, strict=True))}
        for name, histogram in histograms.items():
            histogram.add(tensors[name])
        if histograms:
            self.observed[stage] = self.observed.get(stage, 0) + 1
        return {name: tensors[name] for name in names}

    def close(self) -> None:
        self._sessions.clear()

    def _session(self, graph: Graph) -> Any:
        if graph.name not in self._sessions:
            options = self._ort.SessionOptions()
            options.log_severity_level = 3
            # The graphs of all levels read one mapped weight file; packed copies would multiply the memory.
            options.add_session_config_entry("session.disable_prepacking", "1")
            path = self._bundle.path / graph.file
            tensors = self._tensors.get(graph.name)
            model = self._with_outputs(path, graph, tensors) if tensors else path
            try:
                self._sessions[graph.name] = self._ort.InferenceSession(
                    str(model), options, providers=["CPUExecutionProvider"]
                )
            finally:
                if model != path:
                    model.unlink()
        return self._sessions[graph.name]

    def _with_outputs(self, path: Path, graph: Graph, names: Collection[str]) -> Path:
        """A copy of a graph that has these tensors as outputs too, in the folder of its weight file."""
        model = onnx.load(str(path), load_external_data=False)
        declared = {spec.name for spec in (*graph.inputs, *graph.outputs)}
        for name in names:
            if name not in declared:
                model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        copy = path.with_name(f".{path.stem}.calibration.onnx")
        onnx.save(model, str(copy))
        return copy


def calibrate(
    bundle: Bundle, tensors: Mapping[str, Collection[str]], count: int, report: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Draw `count` pictures with the bundle's default settings, and return the range of every tensor by graph.

    tensors: names of those to observe, by graph. Classes are drawn evenly. Graphs that the default settings never run
    have no ranges. Raises FarError where onnxruntime is not installed.
    """
    manifest = bundle.manifest
    calls: dict[str, int] = {}
    for step in resolve_plan(manifest)[1]:
        for call in step.calls:
            calls[call.stage] = calls.get(call.stage, 0) + call.times
    every = {stage: -(-times // OBSERVED_CALLS) for stage, times in calls.items()}
    engine = CalibrationEngine(bundle, tensors, every)
    pipeline = Pipeline(bundle, engine)
    try:
        pipeline.generate(spread_subjects(manifest, count), range(SEED, SEED + count), batch_size=BATCH)
    finally:
        pipeline.close()
    observed = ", ".join(f"{number} calls of {stage}" for stage, number in engine.observed.items())
    report(f"calibrated on {count} pictures: {observed}")
    return {
        graph: {name: histogram.range() for name, histogram in histograms.items() if histogram.counts.any()}
        for graph, histograms in engine.histograms.items()
    }
