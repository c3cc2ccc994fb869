"""The last step of an export below FP32: draw a picture with the new bundle and with the checkpoint, and refuse the
bundle where they differ by more than the precision allows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from far_export.onnx.check import checking_library
from far_export.stages.stage import Stage
from far_export.torch_engine import Fp16Engine, TorchEngine
from far_export.verify.parity import SampleInputs, VerifyOptions, compare_engines
from far_export.verify.reference import exporter_tolerances, reference_stages
from far_export.verify.results import Report
from far_export.verify.rows import summary_lines
from far_models.checkpoint.load import Checkpoint
from far_runtime.bundle import Bundle
from far_runtime.conditioning.subjects import default_subjects
from far_runtime.engines import open_engine
from far_runtime.engines.base import Engine, EngineOptions
from far_runtime.errors import CheckFailed, FarError
from far_runtime.sampling.settings import resolve_settings

OTHER_PRECISION = {"fp16": "fp32", "bf16": "fp16, which is finer, or fp32", "int8": "fp16"}
"""What to use in place of a precision that failed."""
LARGER_RANGE = "bf16, whose range is larger, or fp32"
"""What to use in place of FP16 where values overflowed. Where none did, BF16 would be coarser."""


def verifying_engine(precision: str) -> str:
    """The engine that verifies an export of this precision on the CPU; FarError where it is not installed."""
    name, extra = checking_library(precision)
    if importlib.util.find_spec(name) is None:
        raise FarError(
            f"--precision {precision}: the export ends with drawing a picture on {name}, which is not installed; "
            f"install it with: pip install 'far-deploy[{extra}]'"
        )
    return name


def check_pictures(
    bundle: Bundle,
    model: Checkpoint,
    decoder: Checkpoint,
    text: Stage | None,
    cast: Sequence[Stage],
    steps: str | None,
    report: Callable[[str], None],
) -> None:
    """Draw a picture with the bundle and with the float32 torch modules; raise CheckFailed where they differ by more
    than the bundle's precision allows.

    cast: the stages as they were exported. In FP16 a second picture is drawn with their modules, since an engine on the
    CPU computes FP16 graphs in float32.
    steps: diffusion steps; None for the bundle's default.
    report: called with every line of progress.
    """
    manifest = bundle.manifest
    stages = reference_stages(manifest, model.model, decoder.model, text)
    inputs = SampleInputs(default_subjects(manifest, 1), [0], resolve_settings(manifest, {"steps": steps}))
    tolerances = exporter_tolerances(stages, manifest)
    engines: list[Callable[[], Engine]] = [
        lambda: open_engine(bundle, verifying_engine(manifest.precision), EngineOptions(arena=False))
    ]
    if manifest.precision == "fp16":
        engines.append(lambda: Fp16Engine(cast))
    for open_candidate in engines:
        engine = open_candidate()
        report(f"verifying: a picture on {engine.name} and in torch")
        options = VerifyOptions(tolerances=tolerances, check_ranges=not isinstance(engine, Fp16Engine))
        try:
            result = compare_engines(bundle, TorchEngine(stages), engine, inputs, options)
        finally:
            engine.close()
        for line in summary_lines(result):
            report(line)
        if not result.passed:
            overflowed = manifest.precision == "fp16" and _has_overflow(result)
            raise CheckFailed(
                f"the {manifest.precision} bundle is refused, on {engine.name}: {result.first_failure}; "
                f"use --precision {LARGER_RANGE if overflowed else OTHER_PRECISION[manifest.precision]}"
            )


def _has_overflow(report: Report) -> bool:
    """Whether any tensor, stage or latents of the candidate held a NaN or infinite value."""
    return (
        any(tensors.overflow for tensors in report.ranges.values())
        or any(stage.nonfinite for stage in report.stages)
        or any(step.nonfinite for step in report.loop)
    )
