"""The page and its plot, on reports whose figures are known."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from far_export.verify.html import amplification, html_page
from far_export.verify.html_plot import axes_of, error_plot, power_of_ten, series_of
from far_export.verify.results import EngineInfo, LoopResult, PictureResult, Report, StageResult
from far_runtime.sampling import far as loop


def stage(name: str, step: int | None, error: float, tolerance: float = 1e-4) -> StageResult:
    bad = int(math.isinf(error))
    first = 0 if bad else None
    at = "" if step is None else f"level {step}"
    return StageResult(name, "out", name, step, at, 1, tolerance, error, 0, error, 1.0, 0.0, bad, 0, first, None)


def picture(difference: int, label: int = 0, name: str = "") -> PictureResult:
    black = np.zeros((4, 4, 3), np.uint8)
    psnr = math.inf if difference == 0 else 20 * math.log10(255 / difference)
    return PictureResult(label, name, 0, 40.0, psnr, difference, black, black + np.uint8(difference))


def report(errors: tuple[float, float], difference: int = 0, name: str = "") -> Report:
    """Two levels, one stage with these errors; the latents are always off by 1e-6."""
    model = {"grid": 4, "masked": False}
    settings = loop.resolve_settings(model, {"levels": [0, 1], "steps": 1, "guidance": 1.0})
    return Report(
        bundle="bundle <1>",
        bundle_id="0123456789abcdef",
        system="far",
        precision="fp32",
        created_by="",
        reference=EngineInfo("torch:cpu", "2"),
        candidate=EngineInfo("onnxruntime:cpu", "1"),
        settings=settings,
        plan=loop.plan(model, settings),
        tolerance_scale=1.0,
        ranges={},
        stages=(*(stage("denoise", i, error) for i, error in enumerate(errors)), stage("decode", None, 0.0, 2e-3)),
        loop=tuple(LoopResult(i, f"level {i}", 1, 1e-3, 1e-6, 1.0, 0.0, 0, 0, None) for i in range(2)),
        pictures=(picture(difference, name=name),),
    )


@pytest.mark.parametrize(("most", "factor"), [(0, 1), (1, 128), (2, 64), (3, 64), (15, 16), (128, 1), (255, 1)])
def test_differences_are_amplified_as_far_as_they_fit(most: int, factor: int) -> None:
    assert amplification([picture(0), picture(most)]) == factor
    assert most * factor <= 255


def circles(svg: str, style: str) -> list[tuple[float, float]]:
    """Centres of the points of one line, its mark in the legend left out."""
    found = re.findall(rf'<circle class="{style}" cx="([\d.]+)" cy="([\d.]+)" r="4"><title>', svg)
    return [(float(x), float(y)) for x, y in found]


def test_points_lie_where_their_errors_are() -> None:
    made = report((1e-6, 1e-5))
    axes = axes_of(series_of(made))
    assert (axes.bottom, axes.top, axes.rim) == (-6, -2, 0)
    (x0, y0), (x1, y1) = circles(error_plot(made), "denoise")
    assert x0 < x1 and y0 > y1  # a larger error is higher up
    assert y0 == pytest.approx(axes.y(1e-6), abs=0.1) and y1 == pytest.approx(axes.y(1e-5), abs=0.1)
    decade = axes.y(1e-6) - axes.y(1e-5)
    assert axes.y(1e-5) - axes.y(1e-4) == pytest.approx(decade)


def test_nan_is_drawn_above_every_error() -> None:
    made = report((math.inf, 1e-5))
    svg = error_plot(made)
    (_, nan), (_, finite) = circles(svg, "denoise")
    axes = axes_of(series_of(made))
    assert nan < axes.y(10.0**axes.top) < finite
    assert "NaN, Inf</text>" in svg and "NaN, Inf</text>" not in error_plot(report((1e-6, 1e-5)))


def test_no_error_at_all_is_drawn_at_the_bottom() -> None:
    made = report((0.0, 0.0))
    axes = axes_of(series_of(made))
    assert {y for _, y in circles(error_plot(made), "denoise")} == {round(axes.y(10.0**axes.bottom), 1)}


def test_power_of_ten() -> None:
    assert power_of_ten(-12) == "10⁻¹²"


def test_names_are_escaped() -> None:
    page = html_page(report((1e-6, 1e-5), name="<script>&"))
    assert "<script>" not in page and "&lt;script&gt;&amp;" in page and "bundle &lt;1&gt;" in page


def test_equal_pictures_are_said_to_be_equal() -> None:
    assert "equal pixel for pixel" in html_page(report((1e-6, 1e-5)))
    page = html_page(report((1e-6, 1e-5), difference=1))
    assert "PSNR 48.1 dB, at most 1 off" in page and "difference × 128" in page and "equal" not in page


def test_pictures_are_called_by_label_and_name_or_by_prompt() -> None:
    assert picture(0).caption == "label 0"
    assert picture(0, 7, "lion").caption == "label 7 lion"
    assert replace(picture(0), label=None, name="a red apple").caption == "a red apple"


def test_the_verdict_follows_from_the_results() -> None:
    good = report((1e-6, 1e-4))
    assert good.passed and good.latents_error == 1e-6 and good.worst_psnr == math.inf
    assert good.to_dict()["worst_psnr"] is None
    bad = [report((1e-6, 2e-4)), report((math.inf, 0.0)), report((0.0, 0.0), difference=3, name="owl")]
    late = tuple(replace(result, error=2e-3) for result in good.loop)
    bad.append(replace(good, loop=late))
    assert [made.passed for made in bad] == [False] * 4
    assert [made.failures[0] for made in bad] == [
        "denoise at level 1 (step 2 of 2): relative error 2.00e-04, tolerance 1e-04",
        "denoise at level 0 (step 1 of 2): NaN or Inf: 1 values of onnxruntime:cpu",
        "picture 1 (label 0 owl, seed 0): PSNR 38.6 dB, expected 40.0 dB or more",
        "the loop's latents after level 0 (step 1 of 2): relative error 2.00e-03, limit 1e-03",
    ]
    for made in bad:
        page = html_page(made)
        assert "FAILED" in page and made.failures[0] in page.replace("&#x27;", "'")
