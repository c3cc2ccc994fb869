"""What verify found, and what is accepted.

A call's error is ||a - b|| / ||b|| (`far_export.verify.parity` names two exceptions), and every call of a stage has to
keep the tolerance that the bundle's manifest gives its graph or the exporter gives the stage, whichever is smaller,
times `tolerance_scale`. In FP32 the latents after each step of the free run may be off by LOOP_FACTOR times the largest
tolerance of the loop's stages (1e-3), and every picture needs the PSNR that `required_psnr` gives for that (40 dB);
`far_export.tolerances` has those of lower precisions, where a free run may be shown and not judged (an infinite limit).
NaN and infinity are never accepted, on either side.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from far_export.onnx.tensor_ranges import FP16_MAX, TensorRange
from far_runtime.conditioning.subjects import Subject
from far_runtime.sampling.base import Step

if TYPE_CHECKING:
    from far_export.verify.distribution import DistributionResult

FORMAT = 3


@dataclass(frozen=True)
class EngineInfo:
    """An engine's name (library:provider) and its library's version."""

    name: str
    version: str


@dataclass(frozen=True)
class StageResult:
    """One output of a stage at one step of the loop, in lockstep.

    step, at: its number (from 0) and name in the loop; None and "" outside. error: of the worst call, number
    `worst_call` (from 0) of `calls`; `tolerance` is for it. relative_error: over all calls together. cosine: the lowest
    of any call. max_abs: the largest difference. nonfinite, nonfinite_reference: NaN and Inf entries of the engine and
    of the reference in all calls; `first_...`: the number of the first such call.
    """

    stage: str
    output: str
    graph: str
    step: int | None
    at: str
    calls: int
    tolerance: float
    error: float
    worst_call: int
    relative_error: float
    cosine: float
    max_abs: float
    nonfinite: int
    nonfinite_reference: int
    first_nonfinite: int | None
    first_nonfinite_reference: int | None

    @property
    def share(self) -> float:
        """The error as a part of the tolerance; above 1 is too much."""
        if self.tolerance == 0:
            return math.inf if self.error else 0.0
        return self.error / self.tolerance

    @property
    def passed(self) -> bool:
        """Whether every call kept the tolerance, with finite numbers on both sides."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class LoopResult:
    """The latents after one step of the free run against the reference's. `inner`: its units (diffusion steps);
    `first_nonfinite`: the one (from 0) after which the engine's state first was not finite."""

    step: int
    at: str
    inner: int
    limit: float
    error: float
    cosine: float
    max_abs: float
    nonfinite: int
    nonfinite_reference: int
    first_nonfinite: int | None

    @property
    def passed(self) -> bool:
        """Whether the latents kept the limit, with finite numbers on both sides."""
        return math.isfinite(self.error) and self.error <= self.limit


@dataclass(frozen=True)
class PictureResult:
    """One picture [H, W, 3] of both runs; psnr in dB (infinite: equal pixel for pixel), max_difference in grey
    values."""

    label: int | None
    name: str
    seed: int
    limit: float
    psnr: float
    max_difference: int
    reference: NDArray[np.uint8] = field(repr=False, compare=False)
    candidate: NDArray[np.uint8] = field(repr=False, compare=False)

    @property
    def caption(self) -> str:
        """What it shows: "label 7 lion", or the prompt."""
        caption = Subject(self.label, self.name).caption
        return caption if self.label is None else f"label {caption}"

    @property
    def passed(self) -> bool:
        """Whether the picture is as close as it has to be."""
        return self.psnr >= self.limit


@dataclass(frozen=True)
class Report:
    """Everything that verify found. `stages` is in the order of execution, `loop` has one entry a step; `ranges` has
    what was looked at inside of graphs, by their names."""

    bundle: str
    bundle_id: str
    system: str
    precision: str
    created_by: str
    reference: EngineInfo
    candidate: EngineInfo
    settings: dict[str, Any]
    plan: tuple[Step, ...]
    tolerance_scale: float
    stages: tuple[StageResult, ...]
    ranges: dict[str, TensorRange]
    loop: tuple[LoopResult, ...]
    pictures: tuple[PictureResult, ...]
    distribution: DistributionResult | None = None

    @property
    def passed(self) -> bool:
        """Whether everything kept its limit."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence for everything that broke its limit: stages first, in the order of execution, then the loop, then
        the pictures."""
        sentences = [self._stage_failure(result) for result in self.stages if not result.passed]
        told = {result.graph for result in self.stages if result.nonfinite}
        sentences += [
            f"graph {name}: leaves the range of its numbers{self._origin(name)}"
            for name, found in self.ranges.items()
            if found.overflow and name not in told
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
    def latents_error(self) -> float:
        """Relative error of the final latents of the free run."""
        return self.loop[-1].error

    @property
    def latents_limit(self) -> float:
        """What the latents' relative error may be after any step."""
        return self.loop[-1].limit

    @property
    def worst_psnr(self) -> float:
        """PSNR of the worst picture in dB."""
        return min(picture.psnr for picture in self.pictures)

    def place(self, step: int) -> str:
        """A step in words: "level 3 (step 4 of 10)"."""
        return f"{self.plan[step].name} (step {step + 1} of {len(self.plan)})"

    def to_dict(self) -> dict[str, Any]:
        """JSON form: all figures, no pixels. Infinite errors, and the PSNR of equal pictures, are null."""
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
                "psnr": self.pictures[0].limit,
            },
            "stages": [_figures(result) for result in self.stages],
            "ranges": {name: asdict(found) for name, found in self.ranges.items()},
            "loop": [_figures(result) for result in self.loop],
            "pictures": [_figures(picture) for picture in self.pictures],
            "latents_error": self.latents_error,
            "worst_psnr": self.worst_psnr,
        }
        if self.distribution is not None:
            form["distribution"] = self.distribution.to_dict()
        finite: dict[str, Any] = _without_infinities(form)
        return finite

    def _origin(self, graph: str) -> str:
        """Where in a graph it became infinite, where that is known."""
        found = self.ranges.get(graph)
        return f": {found.overflow}" if found is not None and found.overflow else ""

    def _stage_failure(self, result: StageResult) -> str:
        where = result.stage if result.step is None else f"{result.stage} at {self.place(result.step)}"
        sides = [
            f"{count} values of {name}{_call(result, first, 'first ')}"
            for first, count, name in (
                (result.first_nonfinite_reference, result.nonfinite_reference, self.reference.name),
                (result.first_nonfinite, result.nonfinite, self.candidate.name),
            )
            if first is not None
        ]
        if sides:
            return f"{where}: NaN or Inf: {'; '.join(sides)}" + self._origin(result.graph)
        worst = _call(result, result.worst_call)
        return f"{where}: relative error {result.error:.2e}{worst}, tolerance {result.tolerance:.0e}"

    def _loop_failure(self, result: LoopResult) -> str:
        where = f"the loop's latents after {self.place(result.step)}"
        if result.first_nonfinite is not None:
            return (
                f"{where}: NaN or Inf of {self.candidate.name} from diffusion step {result.first_nonfinite + 1} of "
                f"{result.inner} on"
            )
        if result.nonfinite_reference:
            return f"{where}: NaN or Inf of {self.reference.name}"
        return f"{where}: relative error {result.error:.2e}, limit {result.limit:.0e}"


def summary(report: Report) -> list[str]:
    """A line for every stage with its worst figures, and one for the free run."""
    lines = []
    for stage in dict.fromkeys(result.stage for result in report.stages):
        of_stage = [result for result in report.stages if result.stage == stage]
        worst = max(of_stage, key=lambda result: result.share)
        calls = sum(result.calls for result in of_stage)
        lines.append(
            f"  {stage:<12} relative error {worst.error:.1e} (limit {worst.tolerance:.0e}), "
            f"1 - cosine {1 - min(result.cosine for result in of_stage):.1e}, {calls} calls"
        )
    looked = [(found.largest, found.tensor) for found in report.ranges.values() if found.calls]
    if looked:
        largest, tensor = max(looked)
        lines.append(f"  largest FP16 number {largest:.3g} (of {FP16_MAX:.0f}), in {tensor}")
    lines += [f"  {sentence}" for sentence in unseen(report)]
    picture = "equal" if math.isinf(report.worst_psnr) else f"{report.worst_psnr:.1f} dB"
    limits = limit_text(report.latents_limit, ".0e"), psnr_limit_text(report.pictures[0].limit)
    lines.append(
        f"  {'drawn freely':<12} latents {report.latents_error:.1e} (limit {limits[0]}), "
        f"picture {picture} (limit {limits[1]})"
    )
    return lines


def limit_text(limit: float, form: str) -> str:
    """A limit in that format, or "none" where the free run is not judged."""
    return format(limit, form) if math.isfinite(limit) else "none"


def psnr_limit_text(limit: float) -> str:
    """The PSNR that a picture needs, "35 dB", or "none" where it is not judged."""
    return limit_text(limit, ".0f") + " dB" * math.isfinite(limit)


def unseen(report: Report) -> list[str]:
    """A sentence where numbers inside of FP16 graphs could not be looked at, so that nobody takes them for sound."""
    reasons = {found.unseen: name for name, found in report.ranges.items() if found.unseen}
    if report.precision != "fp16" or not reasons:
        return []
    reason, graph = next(iter(reasons.items()))
    return [f"the range of FP16 was not looked at inside of graph {graph}: {reason}"]


def _call(result: StageResult, call: int, which: str = "") -> str:
    """Where a stage runs many times a level: at which time."""
    return f" {which}at diffusion step {call + 1} of {result.calls}" if result.calls > 1 else ""


def _figures(result: StageResult | LoopResult | PictureResult) -> dict[str, Any]:
    figures = {name: value for name, value in vars(result).items() if not isinstance(value, np.ndarray)}
    return {**figures, "passed": result.passed}


def _without_infinities(value: Any) -> Any:
    """The same with None for every float that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _without_infinities(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
