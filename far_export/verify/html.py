"""A verify report as an HTML page and as a JSON file. The page is one file that holds its style and its pictures."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from far_export.verify.error_plot import error_plot
from far_export.verify.results import PictureResult, Report
from far_export.verify.rows import error_text, limit_text, psnr_limit_text, psnr_text, table_rows
from far_runtime.storage.atomic import whole_file

PAGE = Path(__file__).with_name("page")


def write_json(report: Report, path: Path) -> None:
    """Write the JSON form, whole or not at all; FarError where that fails."""
    _write(path, json_text(report))


def json_text(report: Report) -> str:
    """The JSON form of a report as text."""
    return json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"


def write_html(report: Report, path: Path) -> None:
    """Write the page, whole or not at all; FarError where that fails."""
    _write(path, html_page(report))


def _write(path: Path, text: str) -> None:
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def html_page(report: Report) -> str:
    """The page as text, from the template page/report.html.jinja."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    factor = amplification(report.pictures)
    environment.filters |= {
        "psnr": psnr_text,
        "data_uri": _data_uri,
        "images": lambda picture: _images(report, picture, factor),
    }
    return environment.get_template("report.html.jinja").render(
        report=report,
        tiles=_tiles(report),
        amplification=factor,
        plot=Markup(error_plot(report)),
        row_groups=table_rows(report),
        facts=_facts(report),
        infinity=math.inf,
    )


@dataclass(frozen=True)
class Tile:
    """One of the large figures at the top of the page."""

    title: str
    value: str
    note: str
    """What stands below the value, in lines."""
    passed: bool


def _tiles(report: Report) -> list[Tile]:
    stage = report.worst_stage
    place = stage.stage if stage.step is None else f"{stage.stage} at {stage.step_name}"
    latents = max(report.loop, key=lambda result: result.error)
    picture = min(report.pictures, key=lambda result: result.psnr)
    largest_difference = max(picture.max_difference for picture in report.pictures)
    nonfinite = sum(result.nonfinite + result.nonfinite_reference for result in report.stages)
    nonfinite += sum(result.nonfinite for result in report.loop)
    return [
        Tile("Worst stage", error_text(stage.error), f"{place}\nlimit {limit_text(stage.tolerance)}", stage.passed),
        Tile(
            "Worst latents",
            error_text(latents.error),
            f"after {latents.step_name}\nlimit {limit_text(latents.limit)}",
            latents.passed,
        ),
        Tile("Worst picture", psnr_text(picture.psnr), f"PSNR\nlimit {psnr_limit_text(picture.limit)}", picture.passed),
        Tile(
            "Largest pixel difference",
            str(largest_difference),
            "of 255 grey values,\nin all pictures",
            all(picture.passed for picture in report.pictures),
        ),
        Tile("NaN and Inf", str(nonfinite), "values of both engines,\nin both runs", nonfinite == 0),
    ]


def amplification(pictures: Iterable[PictureResult]) -> int:
    """The power of two that makes the largest difference of all pictures as bright as it fits; 1 where all are
    equal."""
    largest = max(picture.max_difference for picture in pictures)
    return 1 if largest == 0 else 2 ** int(math.log2(255 / largest))


def _images(report: Report, picture: PictureResult, factor: int) -> list[tuple[str, NDArray[np.uint8]]]:
    """The pixels [H, W, 3] of reference, candidate and their amplified difference, with what each is."""
    difference = np.abs(picture.candidate.astype(np.int16) - picture.reference) * factor
    return [
        (report.reference.name, picture.reference),
        (report.candidate.name, picture.candidate),
        (f"difference × {factor}", difference.clip(0, 255).astype(np.uint8)),
    ]


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    """The picture [H, W, 3] as a PNG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _facts(report: Report) -> dict[str, str]:
    """What was run, by the headings of the page."""
    plan = report.plan
    substeps = ", ".join(str(step.substeps) for step in plan)
    return {
        "Bundle": (
            f"{report.bundle}, id {report.bundle_id}, system {report.system}, by {report.created_by or 'unknown'}"
        ),
        "Reference": report.reference.text,
        "Engine": report.candidate.text,
        "Settings": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.settings.items()),
        f"{plan[0].kind.capitalize()}s": ", ".join(str(step.number) for step in plan),
        "Diffusion steps": f"{substeps} ({sum(step.substeps for step in plan)} in all)",
        "Guidance": ", ".join(f"{step.guidance:.3g}" for step in plan),
        **{
            name.capitalize(): ", ".join(f"{step.details[name]:.3g}" for step in plan if name in step.details)
            for name in plan[0].details
        },
        "Pictures": ", ".join(f"{picture.caption} seed {picture.seed}" for picture in report.pictures),
        "Tolerances": f"the manifest's, or the exporter's where smaller, × {report.tolerance_scale:g}",
    }
