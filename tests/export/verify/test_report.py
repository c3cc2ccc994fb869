"""What passes, the rows, the page and its plot, on reports whose figures are known."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from far_export.onnx.tensor_ranges import TensorRange
from far_export.verify.distribution import DistributionResult
from far_export.verify.error_plot import COLOURS, Decades, error_plot, power_of_ten, series_of
from far_export.verify.html import amplification, html_page
from far_export.verify.results import EngineInfo, LoopResult, PictureResult, Report, StageResult
from far_export.verify.rows import Row, summary_lines, table_rows, unchecked_ranges
from far_runtime.sampling import far as loop
from model_infos import far_info


def stage(name: str, step: int | None, error: float, tolerance: float = 1e-4) -> StageResult:
    bad = int(math.isinf(error))
    first = 0 if bad else None
    step_name = "" if step is None else f"level {step}"
    return StageResult(
        stage=name,
        output="out",
        graph=name,
        step=step,
        step_name=step_name,
        calls=1,
        tolerance=tolerance,
        error=error,
        worst_call=0,
        relative_error=error,
        cosine=1.0,
        max_abs=0.0,
        nonfinite=bad,
        nonfinite_reference=0,
        first_nonfinite=first,
        first_nonfinite_reference=None,
    )


def latents(step: int) -> LoopResult:
    return LoopResult(
        step=step,
        step_name=f"level {step}",
        substeps=1,
        limit=1e-3,
        error=1e-6,
        cosine=1.0,
        max_abs=0.0,
        nonfinite=0,
        nonfinite_reference=0,
        first_nonfinite=None,
    )


def picture(difference: int, label: int = 0, name: str = "") -> PictureResult:
    black = np.zeros((4, 4, 3), np.uint8)
    psnr = math.inf if difference == 0 else 20 * math.log10(255 / difference)
    return PictureResult(label, name, 0, 40.0, psnr, difference, black, black + np.uint8(difference))


def report(errors: tuple[float, float], difference: int = 0, name: str = "") -> Report:
    """Two levels, one stage with these errors; the latents are always off by 1e-6."""
    model = far_info(4)
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
        loop=tuple(latents(i) for i in range(2)),
        pictures=(picture(difference, name=name),),
    )


@pytest.mark.parametrize(("most", "factor"), [(0, 1), (1, 128), (2, 64), (3, 64), (15, 16), (128, 1), (255, 1)])
def test_differences_are_amplified_as_far_as_they_fit(most: int, factor: int) -> None:
    assert amplification([picture(0), picture(most)]) == factor
    assert most * factor <= 255


def markers(svg: str, name: str) -> list[tuple[float, float]]:
    """Places of the markers of one line, step by step; y grows upwards."""
    matches = re.findall(
        rf'<g id="{name}-\d+"><title>{name}: [^<]+</title>.*?<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg, re.S
    )
    return [(float(x), -float(y)) for x, y in matches]


def grid(svg: str) -> list[float]:
    """Heights of the horizontal lines, from the lowest to the highest."""
    lines = re.findall(r'd="M [\d.]+ ([\d.]+) \s*L [\d.]+ \1 \s*"[^>]*stroke: var\(--line\)', svg)
    return sorted(-float(y) for y in lines)


def test_markers_lie_where_their_errors_are() -> None:
    example = report((1e-6, 1e-5))
    assert Decades.of(series_of(example)) == Decades(-6, -2, False)
    svg = error_plot(example)
    (x0, y0), (x1, y1) = markers(svg, "denoise")
    heights = grid(svg)
    assert len(heights) == 5 and x0 < x1
    assert (y0, y1) == pytest.approx(heights[:2], abs=0.1)  # 1e-6 and 1e-5
    assert np.diff(heights) == pytest.approx(heights[1] - heights[0], abs=0.1)
    assert [y for _, y in markers(svg, "latents")] == pytest.approx([heights[0]] * 2, abs=0.1)


def test_nan_is_drawn_above_every_error() -> None:
    svg = error_plot(report((math.inf, 1e-5)))
    (_, nan), (_, finite) = markers(svg, "denoise")
    assert nan == pytest.approx(grid(svg)[-1], abs=0.1) and finite == pytest.approx(grid(svg)[1], abs=0.1)
    assert "NaN, Inf</text>" in svg and "<title>denoise: NaN or Inf</title>" in svg
    assert "NaN, Inf</text>" not in error_plot(report((1e-6, 1e-5)))


def test_an_error_of_zero_is_drawn_at_the_bottom() -> None:
    svg = error_plot(report((0.0, 0.0)))
    assert [y for _, y in markers(svg, "denoise")] == pytest.approx([grid(svg)[0]] * 2, abs=0.1)


def test_every_limit_has_a_dashed_line_and_infinite_ones_have_none() -> None:
    example = report((1e-6, 1e-5))
    svg = error_plot(example)
    assert "limit of denoise: 1e-04</text>" in svg and "limit of latents: 1e-03</text>" in svg
    assert svg.count("stroke-dasharray") == 2
    shown = replace(example, loop=tuple(replace(result, limit=math.inf) for result in example.loop))
    assert error_plot(shown).count("stroke-dasharray") == 1


def test_the_plot_has_the_colours_of_the_page() -> None:
    page = html_page(report((1e-6, 1e-5)))
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert not re.search("#[0-9a-f]{6}", svg)
    assert all(f"--{name}:" in page for name in COLOURS)


def test_without_matplotlib_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = html_page(report((1e-6, 1e-5)))
    assert "<svg" not in page and "pip install matplotlib" in page and "PASSED" in page


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
    assert [example.passed for example in bad] == [False] * 4
    assert [example.failures[0] for example in bad] == [
        "denoise at level 1 (step 2 of 2): relative error 2.00e-04, tolerance 1e-04",
        "denoise at level 0 (step 1 of 2): NaN or Inf: 1 values of onnxruntime:cpu",
        "picture 1 (label 0 owl, seed 0): PSNR 38.6 dB, expected 40.0 dB or more",
        "the loop's latents after level 0 (step 1 of 2): relative error 2.00e-03, limit 1e-03",
    ]
    for example in bad:
        page = html_page(example)
        assert "FAILED" in page and example.failures[0] in page.replace("&#39;", "'")


@pytest.mark.parametrize(("error", "passed"), [(1e-4, True), (math.nextafter(1e-4, 1), False), (math.nan, False)])
def test_a_stage_passes_up_to_its_tolerance(error: float, passed: bool) -> None:
    assert stage("denoise", 0, error).passed is passed


@pytest.mark.parametrize(
    ("error", "limit", "passed"),
    [(1e-3, 1e-3, True), (1.1e-3, 1e-3, False), (9.0, math.inf, True), (math.inf, math.inf, False)],
)
def test_latents_pass_up_to_their_limit_and_never_with_nan(error: float, limit: float, passed: bool) -> None:
    assert replace(latents(0), error=error, limit=limit).passed is passed


@pytest.mark.parametrize(("psnr", "limit", "passed"), [(40.0, 40.0, True), (39.9, 40.0, False), (5.0, -math.inf, True)])
def test_a_picture_passes_from_its_limit_on(psnr: float, limit: float, passed: bool) -> None:
    assert replace(picture(1), psnr=psnr, limit=limit).passed is passed


def test_the_worst_stage_is_that_of_the_largest_part_of_its_tolerance() -> None:
    strict, loose = stage("transformer", 0, 9e-5, 1e-4), stage("decode", None, 1e-3, 2e-3)
    assert replace(report((0.0, 0.0)), stages=(loose, strict)).worst_stage == strict
    assert stage("place", 0, 1e-9, 0.0).error_ratio == math.inf and stage("place", 0, 0.0, 0.0).error_ratio == 0


def test_the_worst_figures_are_those_of_the_end() -> None:
    good = report((0.0, 0.0))
    example = replace(
        good, loop=(good.loop[0], replace(good.loop[1], error=5e-4)), pictures=(picture(0), picture(2), picture(1))
    )
    assert example.latents_error == 5e-4 and example.worst_psnr == picture(2).psnr


def test_a_graph_whose_tensors_overflow_fails_and_is_named_once() -> None:
    ranges = {
        "denoise": TensorRange(overflow="the first is tensor a", calls=1),
        "decode": TensorRange(1.0, "b", calls=1),
    }
    inside = replace(report((0.0, 0.0)), ranges=ranges)
    assert inside.failures == ("graph denoise: leaves the range of its numbers: the first is tensor a",)
    outside = replace(report((math.inf, 0.0)), ranges=ranges)
    assert outside.failures == (
        "denoise at level 0 (step 1 of 2): NaN or Inf: 1 values of onnxruntime:cpu: the first is tensor a",
    )


def test_a_distribution_beyond_its_limit_fails() -> None:
    near, far = (DistributionResult(count=4, bundle=bundle, reference=3, paired=1) for bundle in (4.5, 4.6))
    assert replace(report((0.0, 0.0)), distribution=near).passed
    example = replace(report((0.0, 0.0)), distribution=far)
    assert example.failures == (far.sentence,) and example.to_dict()["distribution"]["passed"] is False


def test_rows_have_the_figures_of_their_results() -> None:
    first = replace(
        stage("denoise", 0, 2e-4),
        calls=3,
        relative_error=3e-5,
        cosine=0.75,
        max_abs=0.5,
        nonfinite=1,
        nonfinite_reference=2,
    )
    example = report((0.0, 0.0))
    late = replace(example.loop[1], error=2e-3, limit=math.inf)
    groups = table_rows(replace(example, stages=(first, *example.stages[1:]), loop=(example.loop[0], late)))
    assert [[(row.step, row.stage) for row in rows] for rows in groups] == [
        [("level 0", "denoise"), ("level 0", "latents")],
        [("level 1", "denoise"), ("level 1", "latents")],
        [("", "decode")],
    ]
    assert groups[0][0] == Row(
        step="level 0",
        stage="denoise",
        calls="3",
        error="2.0e-04",
        limit="1e-04",
        overall_error="3.0e-05",
        cosine_distance="2.5e-01",
        max_abs="5.0e-01",
        nonfinite="3",
        passed=False,
    )
    assert groups[1][1] == Row(
        step="level 1",
        stage="latents",
        calls="",
        error="2.0e-03",
        limit="none",
        overall_error="",
        cosine_distance="0",
        max_abs="0",
        nonfinite="0",
        passed=True,
    )


def test_the_summary_has_the_worst_step_of_each_stage() -> None:
    lines = summary_lines(report((1e-6, 3e-5), difference=3))
    assert lines == [
        "  denoise      relative error 3.0e-05 (limit 1e-04), 1 - cosine 0.0e+00, 2 calls",
        "  decode       relative error 0.0e+00 (limit 2e-03), 1 - cosine 0.0e+00, 1 calls",
        "  free run     latents 1.0e-06 (limit 1e-03), picture 38.6 dB (limit 40 dB)",
    ]


def test_ranges_that_were_not_checked_are_a_warning_in_fp16_alone() -> None:
    ranges = {"denoise": TensorRange(skipped="onnxruntime is not installed")}
    example = replace(report((0.0, 0.0)), ranges=ranges)
    assert unchecked_ranges(example) == []
    figures = {"largest": 0.0, "tensor": "", "overflow": "", "calls": 0, "unseen": "onnxruntime is not installed"}
    assert example.to_dict()["ranges"] == {"denoise": figures}
    (sentence,) = unchecked_ranges(replace(example, precision="fp16"))
    assert sentence == (
        "tensors inside of graph denoise were not checked against the range of FP16: onnxruntime is not installed"
    )
