"""A verify report as a page and as JSON. The page is one file: style and pictures are in it, nothing is loaded."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from far_export.verify.html_plot import error_plot
from far_export.verify.html_style import STYLE
from far_export.verify.results import (
    EngineInfo,
    LoopResult,
    PictureResult,
    Report,
    StageResult,
    limit_text,
    psnr_limit_text,
)
from far_runtime.storage.atomic import whole_file

SMALL = 160
"""Pictures up to this side are enlarged without smoothing, so that single pixels can be seen."""


def write_json(report: Report, path: Path) -> None:
    """Write `report.to_dict()`, whole or not at all; FarError where that fails."""
    _write(path, json_text(report))


def json_text(report: Report) -> str:
    """`report.to_dict()` as JSON."""
    return json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"


def write_html(report: Report, path: Path) -> None:
    """Write the page, whole or not at all; FarError where that fails."""
    _write(path, html_page(report))


def _write(path: Path, text: str) -> None:
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def html_page(report: Report) -> str:
    """The page."""
    sections = [
        _header(report),
        _tiles(report),
        "<h2>Pictures</h2>",
        _pictures(report),
        "<h2>Errors step by step</h2>",
        f'<div class="card plot">{error_plot(report)}</div>',
        "<h2>Every stage at every step</h2>",
        _table(report),
        "<h2>What was run</h2>",
        _facts(report),
        "<h2>How to read it</h2>",
        _explanation(),
    ]
    title = f"{_verdict(report)}: {escape(report.bundle)} on {escape(report.candidate.name)}"
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _verdict(report: Report) -> str:
    return "Passed" if report.passed else "Failed"


def _sign(passed: bool) -> str:
    return "good" if passed else "bad"


def engine_text(engine: EngineInfo) -> str:
    """Name and version of an engine."""
    return f"{engine.name} {engine.version}".strip()


def number(value: float) -> str:
    """An error as 1.2e-06, or what stands for none and for NaN."""
    if not math.isfinite(value):
        return "NaN/Inf"
    return "0" if value == 0 else f"{value:.1e}"


def psnr_text(value: float) -> str:
    """A PSNR in dB, or that the pictures are equal."""
    return "equal" if math.isinf(value) else f"{value:.1f} dB"


def _header(report: Report) -> str:
    failures = "".join(f"<li>{escape(sentence)}</li>" for sentence in report.failures[:10])
    more = len(report.failures) - 10
    if more > 0:
        failures += f"<li>and {more} more</li>"
    outcome = "computes what" if report.passed else "does not compute what"
    return (
        f'<header><div><p class="eyebrow">far verify</p><h1>{escape(report.bundle)}</h1></div>'
        f'<span class="badge {_sign(report.passed)}">{_verdict(report).upper()}</span></header>'
        f"<p>{escape(engine_text(report.candidate))} {outcome} the checkpoint computes in "
        f"{escape(engine_text(report.reference))}, within the limits below: the same noise, every stage at every "
        "level, and the pictures at the end.</p>" + (f'<ul class="failures card">{failures}</ul>' if failures else "")
    )


def _tiles(report: Report) -> str:
    worst = max(report.stages, key=lambda result: result.error / result.tolerance)
    place = worst.stage if worst.step is None else f"{worst.stage} at {worst.at}"
    latents = max(report.loop, key=lambda result: result.error)
    picture = min(report.pictures, key=lambda result: result.psnr)
    most = max(picture.max_difference for picture in report.pictures)
    bad = sum(result.nonfinite + result.nonfinite_reference for result in report.stages)
    bad += sum(result.nonfinite for result in report.loop)
    tiles = [
        ("Worst stage", number(worst.error), f"{place}\nlimit {worst.tolerance:.0e}", worst.passed),
        (
            "Worst latents",
            number(latents.error),
            f"after {latents.at}\nlimit {limit_text(latents.limit, '.0e')}",
            latents.passed,
        ),
        (
            "Worst picture",
            psnr_text(picture.psnr),
            f"PSNR\nlimit {psnr_limit_text(picture.limit)}",
            picture.passed,
        ),
        (
            "Largest pixel difference",
            str(most),
            "of 255 grey values,\nin all pictures",
            all(p.passed for p in report.pictures),
        ),
        ("NaN and Inf", str(bad), "values of both engines,\nin both runs", bad == 0),
    ]
    cells = "".join(
        f'<div class="card tile"><div class="what">{what}</div><div class="figure {_sign(passed)}">{figure}</div>'
        f'<div class="limit">{escape(limit)}</div></div>'
        for what, figure, limit, passed in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def amplification(pictures: Iterable[PictureResult]) -> int:
    """The power of two that makes the largest difference of all pictures as bright as can be; 1 where there is none."""
    most = max(picture.max_difference for picture in pictures)
    return 1 if most == 0 else 2 ** int(math.log2(255 / most))


def _pictures(report: Report) -> str:
    factor = amplification(report.pictures)
    note = (
        "All pictures are equal pixel for pixel, so the differences are black."
        if all(picture.max_difference == 0 for picture in report.pictures)
        else f"Differences are the absolute differences of each colour, times {factor}."
    )
    cards = "".join(_picture(report, picture, factor) for picture in report.pictures)
    return f'<p class="soft">{note}</p><div class="pictures">{cards}</div>'


def _picture(report: Report, picture: PictureResult, factor: int) -> str:
    name = picture.caption
    difference = np.abs(picture.candidate.astype(np.int16) - picture.reference) * factor
    images = [
        (picture.reference, report.reference.name),
        (picture.candidate, report.candidate.name),
        (difference.clip(0, 255).astype(np.uint8), f"difference × {factor}"),
    ]
    figures = "".join(
        f"<figure>{_image(array, f'{name}, seed {picture.seed}: {what}')}"
        f"<figcaption>{escape(what)}</figcaption></figure>"
        for array, what in images
    )
    shown = (
        "equal pixel for pixel"
        if math.isinf(picture.psnr)
        else f"PSNR {picture.psnr:.1f} dB, at most {picture.max_difference} off"
    )
    return (
        f'<div class="card picture"><div class="caption"><span>{escape(name)} '
        f'<span class="soft">seed {picture.seed}</span></span>'
        f'<span class="{_sign(picture.passed)}">{shown}</span></div><div class="triple">{figures}</div></div>'
    )


def _image(array: NDArray[np.uint8], alt: str) -> str:
    """An <img> with the picture in it as a PNG."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    height, width = array.shape[:2]
    style = ' class="small"' if max(height, width) <= SMALL else ""
    return f'<img{style} width="{width}" height="{height}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _table(report: Report) -> str:
    head = (
        '<tr><th class="text">step</th><th class="text">stage</th><th>calls</th><th>worst call</th><th>limit</th>'
        "<th>all calls</th><th>1 − cosine</th><th>max abs</th><th>NaN/Inf</th></tr>"
    )
    bodies = []
    for step, results in groupby(report.stages, key=lambda result: result.step):
        rows = [_stage_row(result) for result in results]
        if step is not None:
            rows.append(_loop_row(report.loop[step]))
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    return f'<div class="card scroll"><table><thead>{head}</thead>{"".join(bodies)}</table></div>'


def _stage_row(result: StageResult) -> str:
    figures = [result.calls, number(result.error), f"{result.tolerance:.0e}", number(result.relative_error)]
    figures += [number(1 - result.cosine), number(result.max_abs), result.nonfinite + result.nonfinite_reference]
    return _row([result.at, result.stage], figures, result.passed)


def _loop_row(result: LoopResult) -> str:
    figures = [
        "",
        "",
        limit_text(result.limit, ".0e"),
        number(result.error),
        number(1 - result.cosine),
        number(result.max_abs),
    ]
    return _row(
        [result.at, "latents, drawn freely"],
        [*figures, result.nonfinite + result.nonfinite_reference],
        result.passed,
    )


def _row(texts: Iterable[str], figures: Iterable[Any], passed: bool) -> str:
    cells = "".join(f'<td class="text">{escape(text)}</td>' for text in texts)
    cells += "".join(f"<td>{figure}</td>" for figure in figures)
    return f"<tr>{cells}</tr>" if passed else f'<tr class="bad">{cells}</tr>'


def _facts(report: Report) -> str:
    plan = report.plan
    facts = [
        (
            "Bundle",
            f"{report.bundle}, id {report.bundle_id}, system {report.system}, by {report.created_by or 'unknown'}",
        ),
        ("Reference", engine_text(report.reference)),
        ("Engine", engine_text(report.candidate)),
        ("Settings", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.settings.items())),
        (f"{plan[0].kind.capitalize()}s", ", ".join(str(step.number) for step in plan)),
        (
            "Diffusion steps",
            f"{', '.join(str(step.substeps) for step in plan)} ({sum(step.substeps for step in plan)} in all)",
        ),
        ("Guidance", ", ".join(f"{step.guidance:.3g}" for step in plan)),
        *(
            (name.capitalize(), ", ".join(f"{step.details[name]:.3g}" for step in plan if name in step.details))
            for name in plan[0].details
        ),
        ("Pictures", ", ".join(f"{p.caption} seed {p.seed}" for p in report.pictures)),
        ("Tolerances", f"the manifest's, or the exporter's where smaller, × {report.tolerance_scale:g}"),
    ]
    entries = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f'<dl class="facts card">{entries}</dl>'


def _explanation() -> str:
    return (
        "<p>Stages are compared in lockstep: every call is made on both engines with the reference's inputs, so an "
        "error is the stage's own. Errors are relative, ‖a − b‖ / ‖b‖, and the limit is for the worst call. The "
        "denoise stage is judged against the larger of its output and the largest term that it adds up, since its "
        "first update can be the small difference of two large terms. Pixels are judged against a mid-grey picture "
        "where the picture is darker.</p>"
        "<p>The latents are those of the engine running alone, compared with the reference's after each step: here "
        "errors add up as they do in use. In FP32 their limit is ten times the largest tolerance of the loop's stages, "
        "and the PSNR that pictures need follows from it; lower precisions have limits of their own, or none where "
        "tokens are drawn or the distribution of the pictures decides.</p>"
    )
