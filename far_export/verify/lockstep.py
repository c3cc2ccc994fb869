"""Two engines in lockstep: every stage call is made on both with the reference's inputs, and the outputs are compared.

A call's error is ||a - b|| / ||b||, with two exceptions. Pixels are measured against a mid-grey picture where they are
darker. The denoise stage is measured against the largest term of its sum where its output is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_export.compare import ErrorStatistics, compare
from far_export.onnx.tensor_ranges import TensorRange, tensor_ranges
from far_export.verify.results import StageResult
from far_runtime.bundle import Bundle, Graph, Manifest
from far_runtime.engines.base import Array, Engine
from far_runtime.sampling.base import Step
from far_runtime.sampling.solvers import COEFFICIENTS

HostInputs = dict[str, NDArray[Any]]
"""Inputs of one call by name, on the host."""


@dataclass(frozen=True)
class ArrayPair:
    """The same array on both engines' devices."""

    reference: Array
    candidate: Array


class Lockstep:
    """An engine that makes every call on two engines with the reference's arrays, and returns the reference's outputs.

    Results are filed under the step of the loop that `enter` was last called with.
    """

    def __init__(
        self, manifest: Manifest, reference: Engine, candidate: Engine, tolerances: Mapping[str, float] | None = None
    ) -> None:
        """tolerances: by stage, in place of the manifest's where they are smaller."""
        self.name = f"{reference.name} | {candidate.name}"
        self._manifest = manifest
        self._tolerances = tolerances or {}
        self._reference, self._candidate = reference, candidate
        self._step: int | None = None
        # By step, stage and output.
        self._statistics: dict[tuple[int | None, str, str], tuple[Graph, ErrorStatistics]] = {}
        # By graph; then by step, and whether the call's outputs were NaN or infinite.
        self._kept_inputs: dict[str, dict[tuple[int | None, bool], HostInputs]] = {}

    def put(self, array: NDArray[Any]) -> Array:
        return ArrayPair(self._reference.put(array), self._candidate.put(array))

    def get(self, array: Array) -> NDArray[Any]:
        return self._reference.get(array.reference)

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        graph = self._manifest.graph(stage, constants or {})
        reference_inputs = {name: pair.reference for name, pair in inputs.items()}
        candidate_inputs = {name: pair.candidate for name, pair in inputs.items()}
        reference_outputs = self._reference.run(stage, reference_inputs, constants)
        candidate_outputs = self._candidate.run(stage, candidate_inputs, constants)
        outputs = {}
        for name, array in reference_outputs.items():
            expected, actual = self._reference.get(array), self._candidate.get(candidate_outputs[name])
            outputs[name] = ArrayPair(array, self._candidate.put(expected.astype(actual.dtype)))
            if self._is_unused(stage, name, inputs):
                continue
            _, statistics = self._statistics.setdefault((self._step, stage, name), (graph, ErrorStatistics()))
            comparison = compare(actual, expected, self._smallest_scale(stage, inputs))
            statistics.add(comparison)
            self._keep_inputs(graph, inputs, constants or {}, bool(comparison.nonfinite))
        return outputs

    def close(self) -> None:
        self._reference.close()
        self._candidate.close()

    def enter(self, step: int | None) -> None:
        """File the calls from here on under this step of the loop, or under none."""
        self._step = step

    def results(self, plan: Sequence[Step], tolerance_scale: float = 1.0) -> tuple[StageResult, ...]:
        """The errors of all calls so far, in the order in which the stages first ran."""
        return tuple(
            StageResult(
                stage=stage,
                output=output,
                graph=graph.name,
                step=step,
                step_name="" if step is None else plan[step].name,
                calls=statistics.calls,
                tolerance=min(self._tolerances.get(stage, math.inf), graph.tolerance) * tolerance_scale,
                error=statistics.error,
                worst_call=statistics.worst_call,
                relative_error=statistics.relative_error,
                cosine=statistics.cosine,
                max_abs=statistics.max_abs,
                nonfinite=statistics.nonfinite,
                nonfinite_reference=statistics.nonfinite_reference,
                first_nonfinite=statistics.first_nonfinite,
                first_nonfinite_reference=statistics.first_nonfinite_reference,
            )
            for (step, stage, output), (graph, statistics) in self._statistics.items()
        )

    def ranges(self, bundle: Bundle) -> dict[str, TensorRange]:
        """The range of the tensors inside of graphs, over the calls whose inputs were kept, by the graph's name."""
        files = {graph.name: bundle.path / graph.file for graph in self._manifest.graphs}
        return {name: tensor_ranges(files[name], list(calls.values())) for name, calls in self._kept_inputs.items()}

    def _keep_inputs(
        self, graph: Graph, inputs: Mapping[str, Array], constants: Mapping[str, int], nonfinite: bool
    ) -> None:
        """Keep the inputs of an FP16 graph's first call at every step, and of the first call of any graph whose output
        was NaN or infinite."""
        kept = self._kept_inputs.get(graph.name, {})
        if (graph.precision == "fp16" or nonfinite) and (self._step, nonfinite) not in kept:
            host_inputs = self._host_inputs(graph, inputs, constants)
            self._kept_inputs.setdefault(graph.name, {})[self._step, nonfinite] = host_inputs

    def _host_inputs(self, graph: Graph, inputs: Mapping[str, Array], constants: Mapping[str, int]) -> HostInputs:
        return {
            spec.name: self.get(inputs[spec.name]).copy()
            if spec.name in inputs
            else np.array([constants[spec.name]], np.int64)
            for spec in graph.inputs
        }

    def _is_unused(self, stage: str, output: str, inputs: Mapping[str, Array]) -> bool:
        """Whether the solver ignores an output: first-order solvers have no use for the history."""
        if stage != "denoise" or output != "next_history":
            return False
        coefficients = self._coefficients(inputs)
        return not (coefficients["x0_state"] or coefficients["x0_output"])

    def _smallest_scale(self, stage: str, inputs: Mapping[str, Array]) -> float:
        """The norm of the largest term that a stage adds up, where it adds terms that cancel; else 0.

        The solver's first update with epsilon prediction is the small difference of two terms that are hundreds of
        times larger. In float32 arithmetic it has no more correct digits than these terms have.
        """
        if stage != "denoise":
            return 0.0
        coefficients = self._coefficients(inputs)
        factor = max(abs(coefficients["state"]), abs(coefficients["x0_state"]))
        return factor * float(np.linalg.norm(self.get(inputs["state"]).astype(np.float64)))

    def _coefficients(self, inputs: Mapping[str, Array]) -> dict[str, float]:
        """The coefficients of a call of the denoise stage, by name."""
        return dict(zip(COEFFICIENTS, map(float, self.get(inputs["coefficients"])), strict=True))
