"""The figures of a report as text: rows of its table and short lines, for the terminal and for the page alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from far_export.onnx.tensor_ranges import FP16_MAX
from far_export.verify.results import LoopResult, Report, StageResult


@dataclass(frozen=True)
class Row:
    """One line of the table: a stage in lockstep, or the latents of the free run, at one step of the loop."""

    step: str
    """The step as in "level 3"; "" outside the loop."""
    stage: str
    """The stage, or "latents"."""
    calls: str
    """How many times the stage ran; "" for the latents."""
    error: str
    """Relative error of the worst call."""
    limit: str
    """The largest relative error that is accepted."""
    overall_error: str
    """Relative error of all calls as one; "" for the latents."""
    cosine_distance: str
    """1 - cosine similarity."""
    max_abs: str
    """The largest absolute error."""
    nonfinite: str
    """NaN and infinite values on both sides."""
    passed: bool


def table_rows(report: Report) -> list[list[Row]]:
    """The rows of the table, grouped by the steps of the loop; what runs outside the loop is a group too."""
    groups = []
    for step, results in groupby(report.stages, key=lambda result: result.step):
        rows = [_stage_row(result) for result in results]
        groups.append(rows if step is None else [*rows, _latents_row(report.loop[step])])
    return groups


def _stage_row(result: StageResult) -> Row:
    return Row(
        step=result.step_name,
        stage=result.stage,
        calls=str(result.calls),
        error=error_text(result.error),
        limit=limit_text(result.tolerance),
        overall_error=error_text(result.relative_error),
        cosine_distance=error_text(1 - result.cosine),
        max_abs=error_text(result.max_abs),
        nonfinite=str(result.nonfinite + result.nonfinite_reference),
        passed=result.passed,
    )


def _latents_row(result: LoopResult) -> Row:
    return Row(
        step=result.step_name,
        stage="latents",
        calls="",
        error=error_text(result.error),
        limit=limit_text(result.limit),
        overall_error="",
        cosine_distance=error_text(1 - result.cosine),
        max_abs=error_text(result.max_abs),
        nonfinite=str(result.nonfinite + result.nonfinite_reference),
        passed=result.passed,
    )


def summary_lines(report: Report) -> list[str]:
    """One line for each stage with its worst figures, and one for the free run."""
    lines = []
    for stage in dict.fromkeys(result.stage for result in report.stages):
        results = [result for result in report.stages if result.stage == stage]
        worst = max(results, key=lambda result: result.error_ratio)
        calls = sum(result.calls for result in results)
        lines.append(
            f"  {stage:<12} relative error {worst.error:.1e} (limit {worst.tolerance:.0e}), "
            f"1 - cosine {1 - min(result.cosine for result in results):.1e}, {calls} calls"
        )
    checked = [(tensors.largest, tensors.tensor) for tensors in report.ranges.values() if tensors.calls]
    if checked:
        largest, tensor = max(checked)
        lines.append(f"  largest FP16 number {largest:.3g} (of {FP16_MAX:.0f}), in {tensor}")
    lines += [f"  {sentence}" for sentence in unchecked_ranges(report)]
    lines.append(
        f"  {'free run':<12} latents {report.latents_error:.1e} (limit {limit_text(report.latents_limit)}), "
        f"picture {psnr_text(report.worst_psnr)} (limit {psnr_limit_text(report.psnr_limit)})"
    )
    return lines


def result_line(report: Report) -> str:
    """Whether the bundle passed, and the worst figures."""
    worst, count = report.worst_stage, len(report.pictures)
    return (
        f"{'passed' if report.passed else 'FAILED'}: worst stage error {error_text(worst.error)} ({worst.stage}, limit "
        f"{limit_text(worst.tolerance)}), final latents {error_text(report.latents_error)} "
        f"(limit {limit_text(report.latents_limit)}), "
        f"{count} picture{'s' if count != 1 else ''}, worst PSNR {psnr_text(report.worst_psnr)} "
        f"(limit {psnr_limit_text(report.psnr_limit)})"
    )


def unchecked_ranges(report: Report) -> list[str]:
    """A warning where the tensors inside of FP16 graphs could not be computed, so that they do not count as sound."""
    reasons = {tensors.skipped: name for name, tensors in report.ranges.items() if tensors.skipped}
    if report.precision != "fp16" or not reasons:
        return []
    reason, graph = next(iter(reasons.items()))
    return [f"tensors inside of graph {graph} were not checked against the range of FP16: {reason}"]


def error_text(value: float) -> str:
    """An error as in "1.2e-06"; "0", or "NaN/Inf" for what is not finite."""
    if not math.isfinite(value):
        return "NaN/Inf"
    return "0" if value == 0 else f"{value:.1e}"


def limit_text(limit: float) -> str:
    """The largest accepted error as in "1e-04", or "none" where the error is only shown."""
    return f"{limit:.0e}" if math.isfinite(limit) else "none"


def psnr_text(value: float) -> str:
    """A PSNR in dB, or "equal"."""
    return "equal" if math.isinf(value) else f"{value:.1f} dB"


def psnr_limit_text(limit: float) -> str:
    """The PSNR that a picture needs, as in "35 dB", or "none" where it is only shown."""
    return f"{limit:.0f} dB" if math.isfinite(limit) else "none"
