"""The end of an export below FP32: a picture drawn with the new bundle and with the checkpoint, and a refusal where
they differ by more than the precision may cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from far_export.onnx.check import checking_library
from far_export.stages.stage import Stage
from far_export.torch_engine import Fp16Engine, TorchEngine
from far_export.verify.parity import compare_engines, own_tolerances, reference_stages
from far_export.verify.results import summary
from far_models.checkpoint.load import Checkpoint
from far_runtime.bundle import Bundle
from far_runtime.conditioning.subjects import default_subjects
from far_runtime.engines import open_engine
from far_runtime.engines.base import Engine, EngineOptions
from far_runtime.errors import CheckFailed, FarError
from far_runtime.sampling.settings import resolve_settings

OTHERS = {"fp16": "fp32", "bf16": "fp16, which is finer, or fp32", "int8": "fp16"}
LARGER = "bf16, whose range is larger, or fp32"
"""In place of FP16 where numbers left its range; where they did not, BF16 is coarser."""


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
    """Draw a picture with the bundle and with the float32 torch modules; CheckFailed where they differ by more than the
    bundle's precision may cost.

    cast: the stages as they were exported. In FP16 a second picture is drawn with their modules, since an engine on the
    CPU computes FP16 graphs in float32.
    """
    manifest = bundle.manifest
    settings = resolve_settings(manifest, {"steps": steps})
    subjects = default_subjects(manifest, 1)
    reference = [*reference_stages(manifest, model.model, decoder.model), *([] if text is None else [text])]
    engines: list[Callable[[], Engine]] = [
        lambda: open_engine(bundle, verifying_engine(manifest.precision), EngineOptions(arena=False))
    ]
    if manifest.precision == "fp16":
        engines.append(lambda: Fp16Engine(cast))
    for opened in engines:
        engine = opened()
        report(f"verifying: a picture on {engine.name} and in torch")
        own = own_tolerances(reference, manifest)
        try:
            found = compare_engines(
                bundle, TorchEngine(reference), engine, subjects, [0], settings, tolerances=own,
                inside=not isinstance(engine, Fp16Engine),
            )  # fmt: skip
        finally:
            engine.close()
        for line in summary(found):
            report(line)
        if not found.passed:
            others = len(found.failures) - 1
            overflowed = any(seen.overflow for seen in found.ranges.values())
            overflowed |= any(stage.nonfinite for stage in found.stages) or any(step.nonfinite for step in found.loop)
            instead = LARGER if manifest.precision == "fp16" and overflowed else OTHERS[manifest.precision]
            raise CheckFailed(
                f"the {manifest.precision} bundle is refused, on {engine.name}: {found.failures[0]}"
                + (f" (and {others} more)" * bool(others))
                + f"; use --precision {instead}"
            )
