"""Two engines in lockstep: every stage call is made on both, with the reference's arrays, and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_export.compare import Tally, compare
from far_export.onnx.tensor_ranges import TensorRange, tensor_ranges
from far_export.verify.results import StageResult
from far_runtime.bundle import Bundle, Graph, Manifest
from far_runtime.engines.base import Array, Engine
from far_runtime.sampling.base import Step
from far_runtime.sampling.solvers import COEFFICIENTS


@dataclass(frozen=True)
class Pair:
    """The same array on both engines' devices."""

    reference: Array
    candidate: Array


class Lockstep:
    """An engine that makes every call on two engines, with the reference's arrays, and passes the reference's on.

    Calls are filed under the step of the loop that was last entered.
    """

    def __init__(
        self, manifest: Manifest, reference: Engine, candidate: Engine, tolerances: Mapping[str, float] | None = None
    ) -> None:
        self.name = f"{reference.name} | {candidate.name}"
        self._manifest = manifest
        self._tolerances = tolerances or {}
        self._reference, self._candidate = reference, candidate
        self._step: int | None = None
        self._tallies: dict[tuple[int | None, str, str], tuple[Graph, Tally]] = {}
        self._looked_at: dict[str, dict[tuple[int | None, bool], dict[str, NDArray[Any]]]] = {}

    def put(self, array: NDArray[Any]) -> Array:
        return Pair(self._reference.put(array), self._candidate.put(array))

    def get(self, array: Array) -> NDArray[Any]:
        return self._reference.get(array.reference)

    def run(
        self, stage: str, inputs: Mapping[str, Array], constants: Mapping[str, int] | None = None
    ) -> dict[str, Array]:
        graph = self._manifest.graph(stage, constants or {})
        ours = self._reference.run(stage, {name: pair.reference for name, pair in inputs.items()}, constants)
        theirs = self._candidate.run(stage, {name: pair.candidate for name, pair in inputs.items()}, constants)
        outputs = {}
        for name, array in ours.items():
            expected, got = self._reference.get(array), self._candidate.get(theirs[name])
            outputs[name] = Pair(array, self._candidate.put(expected.astype(got.dtype)))
            if self._unused(stage, name, inputs):
                continue
            _, tally = self._tallies.setdefault((self._step, stage, name), (graph, Tally()))
            found = compare(got, expected, self._floor(stage, inputs))
            tally.add(found)
            self._keep(graph, inputs, constants or {}, bool(found.nonfinite))
        return outputs

    def close(self) -> None:
        self._reference.close()
        self._candidate.close()

    def enter(self, step: int | None) -> None:
        """What runs from here on belongs to that step of the loop, or to none."""
        self._step = step

    def results(self, plan: Sequence[Step], tolerance_scale: float = 1.0) -> tuple[StageResult, ...]:
        """The errors of everything that has run, in the order in which it first ran."""
        return tuple(
            StageResult(
                stage=stage,
                output=output,
                graph=graph.name,
                step=step,
                at="" if step is None else plan[step].name,
                calls=tally.calls,
                tolerance=min(self._tolerances.get(stage, math.inf), graph.tolerance) * tolerance_scale,
                error=tally.error,
                worst_call=tally.worst_call,
                relative_error=tally.relative_error,
                cosine=tally.cosine,
                max_abs=tally.max_abs,
                nonfinite=tally.nonfinite,
                nonfinite_reference=tally.nonfinite_reference,
                first_nonfinite=tally.first_nonfinite,
                first_nonfinite_reference=tally.first_nonfinite_reference,
            )
            for (step, stage, output), (graph, tally) in self._tallies.items()
        )

    def ranges(self, bundle: Bundle) -> dict[str, TensorRange]:
        """What the tensors of every graph came to in the calls that were kept, by the graph's name."""
        files = {graph.name: bundle.path / graph.file for graph in self._manifest.graphs}
        return {name: tensor_ranges(files[name], list(calls.values())) for name, calls in self._looked_at.items()}

    def _keep(self, graph: Graph, inputs: Mapping[str, Array], constants: Mapping[str, int], nonfinite: bool) -> None:
        """Keep the inputs of an FP16 graph's first call at every step, and of any graph's first that was not finite."""
        kept = self._looked_at.get(graph.name, {})
        if (graph.precision == "fp16" or nonfinite) and (self._step, nonfinite) not in kept:
            self._looked_at.setdefault(graph.name, {})[self._step, nonfinite] = self._on_host(graph, inputs, constants)

    def _on_host(
        self, graph: Graph, inputs: Mapping[str, Array], constants: Mapping[str, int]
    ) -> dict[str, NDArray[Any]]:
        return {
            spec.name: self.get(inputs[spec.name]).copy()
            if spec.name in inputs
            else np.array([constants[spec.name]], np.int64)
            for spec in graph.inputs
        }

    def _unused(self, stage: str, output: str, inputs: Mapping[str, Array]) -> bool:
        """Whether the solver has no use for an output: the history of one that looks no step back is 0."""
        if stage != "denoise" or output != "next_history":
            return False
        factors = dict(zip(COEFFICIENTS, self.get(inputs["coefficients"]), strict=True))
        return not (factors["x0_state"] or factors["x0_output"])

    def _floor(self, stage: str, inputs: Mapping[str, Array]) -> float:
        """The norm of the largest term that a stage adds up, where it adds terms that cancel.

        The solver's first update with epsilon prediction is the small difference of two terms that are hundreds of
        times larger, and has no more correct digits than they have, in any float32 arithmetic.
        """
        if stage != "denoise":
            return 0.0
        factors = dict(zip(COEFFICIENTS, self.get(inputs["coefficients"]), strict=True))
        at_state = max(abs(float(factors["state"])), abs(float(factors["x0_state"])))
        return at_state * float(np.linalg.norm(self.get(inputs["state"]).astype(np.float64)))
