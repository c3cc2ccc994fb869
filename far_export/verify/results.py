"""What a verification measured, with the limit and the outcome of every figure, and the JSON form of all of it.

A call's error is ||a - b|| / ||b|| (`far_export.verify.lockstep` names two exceptions). Every call of a stage has to
keep the tolerance that the bundle's manifest gives its graph or that the exporter gives the stage, whichever is
smaller, times `tolerance_scale`. The free run has limits of its own (`far_export.tolerances`); an infinite limit means
that the figure is shown and cannot fail. NaN and infinity always fail, on either side.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from far_export.onnx.tensor_ranges import TensorRange
from far_runtime.conditioning.subjects import Subject
from far_runtime.sampling.base import Step

if TYPE_CHECKING:
    from far_export.verify.distribution import DistributionResult

FORMAT = 3
JSON_KEYS = {"step_name": "at", "substeps": "inner", "skipped": "unseen"}
"""Fields whose key in the JSON form has another name."""


@dataclass(frozen=True)
class EngineInfo:
    """One of the two engines that are compared."""

    name: str
    """Library and provider, as in "onnxruntime:cpu"."""
    version: str
    """The library's version; "" where it has none."""

    @property
    def text(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}".strip()


@dataclass(frozen=True)
class StageResult:
    """One output of a stage at one step of the loop, over all calls in lockstep; calls are counted from 0."""

    stage: str
    output: str
    """Name of the output."""
    graph: str
    """Name of the graph that computed it on the candidate engine."""
    step: int | None
    """Index of the loop's step; None for a stage outside the loop."""
    step_name: str
    """The step as in "level 3"; "" outside the loop."""
    calls: int
    """How many times the stage ran."""
    tolerance: float
    """The largest relative error that a call may have."""
    error: float
    """Relative error of the worst call; infinite where a value is NaN or infinite."""
    worst_call: int
    relative_error: float
    """Relative error of the outputs of all calls taken as one vector."""
    cosine: float
    """The lowest cosine similarity of any call."""
    max_abs: float
    """The largest absolute error of any value."""
    nonfinite: int
    """NaN and infinite values of the candidate engine."""
    nonfinite_reference: int
    """NaN and infinite values of the reference."""
    first_nonfinite: int | None
    """The first call with such a value on the candidate engine."""
    first_nonfinite_reference: int | None
    """The first call with such a value in the reference."""

    @property
    def error_ratio(self) -> float:
        """The error divided by the tolerance; above 1 is a failure."""
        if self.tolerance == 0:
            return math.inf if self.error else 0.0
        return self.error / self.tolerance

    @property
    def passed(self) -> bool:
        """Whether every call is within the tolerance, with finite values on both sides."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class LoopResult:
    """The latents of the free run after one step of the loop, against the reference's."""

    step: int
    """Index of the step."""
    step_name: str
    """The step as in "level 3"."""
    substeps: int
    """Diffusion steps in it, or 1."""
    limit: float
    """The largest relative error that the latents may have; infinite where it is only shown."""
    error: float
    """Relative error; infinite where a value is NaN or infinite."""
    cosine: float
    """Cosine similarity."""
    max_abs: float
    """The largest absolute error of any value."""
    nonfinite: int
    """NaN and infinite values of the candidate engine."""
    nonfinite_reference: int
    """NaN and infinite values of the reference."""
    first_nonfinite: int | None
    """The diffusion step, from 0, after which the candidate's state had such a value for the first time."""

    @property
    def passed(self) -> bool:
        """Whether the latents are within the limit, with finite values on both sides."""
        return math.isfinite(self.error) and self.error <= self.limit


@dataclass(frozen=True)
class PictureResult:
    """One picture of the free run against the reference's."""

    label: int | None
    """Its class; None where it was drawn from a prompt."""
    name: str
    """The class's name, or the prompt."""
    seed: int
    limit: float
    """PSNR that it needs, in dB; minus infinity where it is only shown."""
    psnr: float
    """Peak signal-to-noise ratio in dB; infinite where the pictures are equal."""
    max_difference: int
    """The largest absolute error of any pixel, of 255."""
    reference: NDArray[np.uint8] = field(repr=False, compare=False)
    """Pixels of the reference [H, W, 3]."""
    candidate: NDArray[np.uint8] = field(repr=False, compare=False)
    """Pixels of the candidate [H, W, 3]."""

    @property
    def caption(self) -> str:
        """What it shows: "label 7 lion", or the prompt."""
        caption = Subject(self.label, self.name).caption
        return caption if self.label is None else f"label {caption}"

    @property
    def passed(self) -> bool:
        """Whether the PSNR is high enough."""
        return self.psnr >= self.limit


@dataclass(frozen=True)
class Report:
    """Everything that one verification measured."""

    bundle: str
    """Name of the bundle's folder."""
    bundle_id: str
    system: str
    precision: str
    created_by: str
    """Name and version of the exporter."""
    reference: EngineInfo
    candidate: EngineInfo
    settings: dict[str, Any]
    """Sampling settings by name."""
    plan: tuple[Step, ...]
    """Steps of the loop."""
    tolerance_scale: float
    """What the tolerances were multiplied by."""
    stages: tuple[StageResult, ...]
    """Results in lockstep, in the order of execution."""
    ranges: dict[str, TensorRange]
    """Range of the tensors inside of graphs, by the graph's name."""
    loop: tuple[LoopResult, ...]
    """Latents of the free run, one for each step of the plan."""
    pictures: tuple[PictureResult, ...]
    distribution: DistributionResult | None = None

    @property
    def passed(self) -> bool:
        """Whether everything is within its limit."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence for everything beyond its limit: stages in the order of execution, then graphs whose tensors
        overflow, the loop, the pictures and the distribution."""
        sentences = [self._stage_failure(result) for result in self.stages if not result.passed]
        graphs_with_nonfinite_outputs = {result.graph for result in self.stages if result.nonfinite}
        sentences += [
            f"graph {name}: leaves the range of its numbers{self._overflow(name)}"
            for name, tensors in self.ranges.items()
            if tensors.overflow and name not in graphs_with_nonfinite_outputs
        ]
        sentences += [self._loop_failure(result) for result in self.loop if not result.passed]
        sentences += [
            f"picture {i} ({picture.caption}, seed {picture.seed}): PSNR {picture.psnr:.1f} dB, "
            f"expected {picture.limit:.1f} dB or more"
            for i, picture in enumerate(self.pictures, start=1)
            if not picture.passed
        ]
        if self.distribution is not None and not self.distribution.passed:
            sentences.append(self.distribution.sentence)
        return tuple(sentences)

    @property
    def first_failure(self) -> str:
        """The first of `failures`, and how many more there are."""
        more = len(self.failures) - 1
        return self.failures[0] + (f" (and {more} more)" if more else "")

    @property
    def worst_stage(self) -> StageResult:
        """The stage whose error is the largest part of its tolerance."""
        return max(self.stages, key=lambda result: result.error_ratio)

    @property
    def latents_error(self) -> float:
        """Relative error of the final latents of the free run."""
        return self.loop[-1].error

    @property
    def latents_limit(self) -> float:
        """The largest relative error that the latents of the free run may have after any step."""
        return self.loop[-1].limit

    @property
    def worst_psnr(self) -> float:
        """PSNR of the worst picture in dB."""
        return min(picture.psnr for picture in self.pictures)

    @property
    def psnr_limit(self) -> float:
        """PSNR that every picture needs, in dB."""
        return self.pictures[0].limit

    def to_dict(self) -> dict[str, Any]:
        """JSON form: all figures, without pixels. Infinite errors, and the PSNR of equal pictures, are null."""
        form = {
            "format": FORMAT,
            "passed": self.passed,
            "failures": list(self.failures),
            "bundle": {
                "name": self.bundle,
                "id": self.bundle_id,
                "system": self.system,
                "precision": self.precision,
                "created_by": self.created_by,
            },
            "reference": asdict(self.reference),
            "candidate": asdict(self.candidate),
            "settings": self.settings,
            "plan": [
                {"step": step.name, "inner": step.substeps, "guidance": step.guidance, **step.details}
                for step in self.plan
            ],
            "limits": {
                "tolerance_scale": self.tolerance_scale,
                "stages": {result.graph: result.tolerance for result in self.stages},
                "latents": self.latents_limit,
                "psnr": self.psnr_limit,
            },
            "stages": [_figures(result) | {"passed": result.passed} for result in self.stages],
            "ranges": {name: _figures(tensors) for name, tensors in self.ranges.items()},
            "loop": [_figures(result) | {"passed": result.passed} for result in self.loop],
            "pictures": [_figures(picture) | {"passed": picture.passed} for picture in self.pictures],
            "latents_error": self.latents_error,
            "worst_psnr": self.worst_psnr,
        }
        if self.distribution is not None:
            form["distribution"] = self.distribution.to_dict()
        finite: dict[str, Any] = _infinite_to_none(form)
        return finite

    def _step_text(self, step: int) -> str:
        """A step in words: "level 3 (step 4 of 10)"."""
        return f"{self.plan[step].name} (step {step + 1} of {len(self.plan)})"

    def _overflow(self, graph: str) -> str:
        """The first tensor of a graph that left its range, where there is one."""
        tensors = self.ranges.get(graph)
        return f": {tensors.overflow}" if tensors is not None and tensors.overflow else ""

    def _stage_failure(self, result: StageResult) -> str:
        where = result.stage if result.step is None else f"{result.stage} at {self._step_text(result.step)}"
        nonfinite = [
            f"{count} values of {engine.name}{_call_text(result, first_call, 'first ')}"
            for engine, count, first_call in (
                (self.reference, result.nonfinite_reference, result.first_nonfinite_reference),
                (self.candidate, result.nonfinite, result.first_nonfinite),
            )
            if first_call is not None
        ]
        if nonfinite:
            return f"{where}: NaN or Inf: {'; '.join(nonfinite)}" + self._overflow(result.graph)
        worst = _call_text(result, result.worst_call)
        return f"{where}: relative error {result.error:.2e}{worst}, tolerance {result.tolerance:.0e}"

    def _loop_failure(self, result: LoopResult) -> str:
        where = f"the loop's latents after {self._step_text(result.step)}"
        if result.first_nonfinite is not None:
            return (
                f"{where}: NaN or Inf of {self.candidate.name} from diffusion step {result.first_nonfinite + 1} of "
                f"{result.substeps} on"
            )
        if result.nonfinite_reference:
            return f"{where}: NaN or Inf of {self.reference.name}"
        return f"{where}: relative error {result.error:.2e}, limit {result.limit:.0e}"


def _call_text(result: StageResult, call: int, which: str = "") -> str:
    """The diffusion step of a call, for a stage that runs many times a step of the loop."""
    return f" {which}at diffusion step {call + 1} of {result.calls}" if result.calls > 1 else ""


def _figures(result: StageResult | LoopResult | PictureResult | TensorRange) -> dict[str, Any]:
    """All fields but pixels, under the keys of the JSON form."""
    return {
        JSON_KEYS.get(name, name): value for name, value in vars(result).items() if not isinstance(value, np.ndarray)
    }


def _infinite_to_none(value: Any) -> Any:
    """The same with None for NaN and infinite floats, which JSON cannot express."""
    if isinstance(value, dict):
        return {name: _infinite_to_none(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_infinite_to_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
