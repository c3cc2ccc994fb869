"""Calibration: how large the inputs of the products to be quantised grow while a bundle draws pictures.

An engine that is handed to the ordinary pipeline: it runs the FP32 graphs on ONNX Runtime with those inputs as further
outputs, and keeps a histogram of each and nothing else, so that memory does not grow with the number of calls.
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
STEPS = 255 // 2
"""Largest number of an int8 value without its lowest, so that it is symmetric."""

OBSERVED_CALLS = 128
"""Calls of a stage that are looked at while a batch is drawn, evenly spread over its levels and diffusion steps."""

BATCH = 4
SEED = 1 << 20
"""First seed of the calibration pictures, far from those that people and checks use."""


class Histogram:
    """Absolute values in BINS equal bins from 0 to `top`, which doubles whenever a value lies beyond it."""

    def __init__(self) -> None:
        self.top = 0.0
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count values of any shape; FarError for NaN and infinity."""
        if not values.size:
            return
        sizes = np.abs(values).ravel()
        largest = float(sizes.max())
        if not np.isfinite(largest):
            raise FarError("calibration met NaN or infinity in the FP32 graphs; far verify says where it begins")
        if self.top == 0:
            self.top = largest
        while largest > self.top:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2
        if self.top == 0:
            self.counts[0] += sizes.size
            return
        places = np.minimum((sizes * (BINS / self.top)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(places, minlength=BINS)

    def range(self) -> float:
        """The largest value that int8 should reach: what makes the mean squared rounding and clipping error least."""
        if self.top == 0:
            return 1.0
        centres = (np.arange(BINS) + 0.5) * (self.top / BINS)
        used = int(np.flatnonzero(self.counts)[-1]) + 1
        best, least = self.top * used / BINS, np.inf
        for bins in np.unique(np.linspace(used * 0.05, used, 160).round().astype(int).clip(1)):
            bound = self.top * int(bins) / BINS
            step = bound / STEPS
            rounded = np.minimum(np.round(centres / step), STEPS) * step
            error = float(self.counts @ (centres - rounded) ** 2)
            if error < least:
                best, least = bound, error
        return best


class CalibrationEngine:
    """Runs a bundle's FP32 graphs on ONNX Runtime's CPU provider, watching tensors of some of them.

    watched: by graph name, the tensors to look at. every: by stage, one call in how many is looked at.
    """

    name = "calibration"
    version = ""

    def __init__(self, bundle: Bundle, watched: Mapping[str, Collection[str]], every: Mapping[str, int]) -> None:
        try:
            self._ort: Any = importlib.import_module("onnxruntime")
        except ImportError:
            raise FarError(
                "int8 is calibrated with onnxruntime, which is not installed; install it with: "
                "pip install 'far-deploy[cpu]'"
            ) from None
        self._bundle, self._watched, self._every = bundle, watched, every
        self._sessions: dict[str, Any] = {}
        self._calls: dict[str, int] = {}
        self.observed: dict[str, int] = {}
        self.histograms = {graph: {name: Histogram() for name in names} for graph, names in watched.items()}

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
        own = self.histograms.get(graph.name, {})
        if call % self._every.get(stage, 1):
            own = {}
        produced = [name for name in own if name not in feeds and name not in names]
        arrays = self._session(graph).run([*names, *produced], feeds)
        seen = {**feeds, **dict(zip([*names, *produced], arrays, strict=True))}
        for name, histogram in own.items():
            histogram.add(seen[name])
        if own:
            self.observed[stage] = self.observed.get(stage, 0) + 1
        return {name: seen[name] for name in names}

    def close(self) -> None:
        self._sessions.clear()

    def _session(self, graph: Graph) -> Any:
        if graph.name not in self._sessions:
            options = self._ort.SessionOptions()
            options.log_severity_level = 3
            # Graphs per level read the one mapped weight file; packed copies in each would multiply the memory.
            options.add_session_config_entry("session.disable_prepacking", "1")
            path = self._bundle.path / graph.file
            watched = self._watched.get(graph.name)
            model = self._with_outputs(path, graph, watched) if watched else path
            try:
                self._sessions[graph.name] = self._ort.InferenceSession(
                    str(model), options, providers=["CPUExecutionProvider"]
                )
            finally:
                if model != path:
                    model.unlink()
        return self._sessions[graph.name]

    def _with_outputs(self, path: Path, graph: Graph, names: Collection[str]) -> Path:
        """A copy of a graph, beside it for the sake of its weight file, that gives these tensors too."""
        model = onnx.load(str(path), load_external_data=False)
        there = {spec.name for spec in (*graph.inputs, *graph.outputs)}
        for name in names:
            if name not in there:
                model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        copy = path.with_name(f".{path.stem}.calibration.onnx")
        onnx.save(model, str(copy))
        return copy


def calibrate(
    bundle: Bundle, watched: Mapping[str, Collection[str]], count: int, report: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Draw `count` pictures with the bundle's default settings, subjects spread over its classes; returns by graph the
    range of every watched tensor.

    Graphs that those settings never run have no ranges. Raises FarError where onnxruntime is missing.
    """
    manifest = bundle.manifest
    calls: dict[str, int] = {}
    for step in resolve_plan(manifest)[1]:
        for call in step.calls:
            calls[call.stage] = calls.get(call.stage, 0) + call.times
    every = {stage: -(-times // OBSERVED_CALLS) for stage, times in calls.items()}
    engine = CalibrationEngine(bundle, watched, every)
    pipeline = Pipeline(bundle, engine)
    try:
        pipeline.generate(spread_subjects(manifest, count), range(SEED, SEED + count), batch_size=BATCH)
    finally:
        pipeline.close()
    looked = ", ".join(f"{seen} calls of {stage}" for stage, seen in engine.observed.items())
    report(f"calibrated on {count} pictures: {looked}")
    return {
        graph: {name: histogram.range() for name, histogram in own.items() if histogram.counts.any()}
        for graph, own in engine.histograms.items()
    }
