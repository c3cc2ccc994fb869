"""The check at the end of an export below FP32: which engines draw, when a bundle is refused, and what helps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from far_export.load import load_pair
from far_export.onnx.tensor_ranges import TensorRange
from far_export.torch_engine import Fp16Engine
from far_export.verify import acceptance
from far_export.verify.acceptance import check_pictures
from far_export.verify.parity import VerifyOptions
from far_export.verify.results import Report
from far_runtime.bundle import Bundle, open_bundle
from far_runtime.engines.base import Engine
from far_runtime.errors import CheckFailed

if TYPE_CHECKING:
    from conftest import Tiny


class Comparisons:
    """Takes the place of `compare_engines`, and notes its calls and which engines were closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines: list[str] = []
        self.options: list[VerifyOptions] = []
        self.closed: list[str] = []
        self.compare: Any = acceptance.compare_engines
        monkeypatch.setattr(acceptance, "compare_engines", self)

    def __call__(
        self, bundle: Bundle, reference: Engine, candidate: Engine, inputs: Any, options: VerifyOptions
    ) -> Report:
        report: Report = self.compare(bundle, reference, candidate, inputs, replace(options, check_ranges=False))
        self.engines.append("fp16" if isinstance(candidate, Fp16Engine) else candidate.name)
        self.options.append(options)
        close = candidate.close

        def note_and_close() -> None:
            self.closed.append(self.engines[-1])
            close()

        candidate.close = note_and_close
        return report


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> Comparisons:
    return Comparisons(monkeypatch)


def check(tiny: Tiny, precision: str) -> list[str]:
    """Check the tiny FP32 bundle as if it were of that precision; the lines that were reported."""
    bundle = open_bundle(tiny.bundle)
    lines: list[str] = []
    model, vae = load_pair(tiny.safetensors, tiny.vae)
    stages = acceptance.reference_stages(bundle.manifest, model.model, vae.model)
    claimed = Bundle(bundle.path, replace(bundle.manifest, precision=precision))
    check_pictures(claimed, model, vae, None, stages, "1", lines.append)
    return lines


def test_fp16_draws_on_an_engine_and_in_fp16_arithmetic(tiny: Tiny, comparisons: Comparisons) -> None:
    lines = check(tiny, "fp16")
    assert comparisons.engines == comparisons.closed == ["onnxruntime:cpu", "fp16"]
    assert [options.check_ranges for options in comparisons.options] == [True, False]
    assert all(options.tolerances["denoise"] == 1e-4 for options in comparisons.options)  # the FP32 graphs' own
    assert [line for line in lines if line.startswith("verifying")] == [
        "verifying: a picture on onnxruntime:cpu and in torch",
        "verifying: a picture on torch:cpu:fp16 and in torch",
    ]
    assert sum("free run" in line for line in lines) == 2


def test_int8_draws_on_an_engine_alone(tiny: Tiny, comparisons: Comparisons) -> None:
    check(tiny, "int8")
    assert len(comparisons.engines) == 1


@pytest.mark.parametrize(
    ("precision", "failing", "advice"),
    [
        ("fp16", "error", "use --precision fp32"),
        ("fp16", "overflow", "use --precision bf16, whose range is larger, or fp32"),
        ("fp16", "nonfinite stage", "use --precision bf16, whose range is larger, or fp32"),
        ("fp16", "nonfinite latents", "use --precision bf16, whose range is larger, or fp32"),
        ("int8", "nonfinite stage", "use --precision fp16"),
    ],
)
def test_a_bundle_beyond_its_limits_is_refused_with_another_precision(
    tiny: Tiny, comparisons: Comparisons, precision: str, failing: str, advice: str
) -> None:
    compare = comparisons.compare

    def compare_badly(*arguments: Any) -> Report:
        report = compare(*arguments)
        stage, step = report.stages[0], report.loop[0]
        change: dict[str, Any] = {
            "error": {"stages": (replace(stage, error=0.9), *report.stages[1:])},
            "overflow": {"ranges": {stage.graph: TensorRange(overflow="the first is tensor a", calls=1)}},
            "nonfinite stage": {"stages": (replace(stage, error=math.inf, nonfinite=1), *report.stages[1:])},
            "nonfinite latents": {"loop": (replace(step, error=math.inf, nonfinite=1), *report.loop[1:])},
        }[failing]
        return replace(report, **change)

    comparisons.compare = compare_badly
    with pytest.raises(CheckFailed) as caught:
        check(tiny, precision)
    assert f"the {precision} bundle is refused, on onnxruntime:cpu: " in str(caught.value)
    assert str(caught.value).endswith(advice)
    assert comparisons.closed == ["onnxruntime:cpu"]  # the engine is closed, and no other one draws
