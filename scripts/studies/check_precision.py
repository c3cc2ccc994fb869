"""Every precision against FP32 on a trained model: export, verify stages and pictures, compare distributions.

    python scripts/studies/check_precision.py -o runs/precision --json runs/precision/table.json

Prints a table and exits with 1 where a precision exceeds one of its limits. Finished rows stay in the output folder, so
that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from far_runtime.bundle import PRECISIONS, Bundle
from far_runtime.cli.option_names import with_options
from far_runtime.errors import CheckFailed, FarError

ZOO = Path(__file__).resolve().parents[2] / "models" / "zoo" / "far-emoji-64"
FILE = click.Path(path_type=Path)
HALF = "torch:cpu:fp16"
ENGINES = {"fp32": "openvino", "fp16": HALF, "bf16": "openvino", "int8": "openvino"}
"""The engine that computes each precision on a CPU as a GPU would.

ONNX Runtime and OpenVINO compute FP16 graphs in FP32 on a CPU, so FP16 runs as cast modules in torch.
"""

COLUMNS = (
    "precision", "engine", "MB", "stage", "error", "limit", "1-cos", "PSNR", "worst", "distance", "FP32", "ratio",
    "same seeds", "",
)  # fmt: skip


@click.command()
@click.option("-o", "--output", type=FILE, required=True, help="Folder for the bundles and the finished rows.")
@click.option(
    "--checkpoint", type=FILE, default=ZOO / "far.safetensors", show_default="the zoo's", help="Checkpoint of a FAR."
)
@click.option("--vae", type=FILE, default=ZOO / "vae.safetensors", show_default="the zoo's", help="Its VAE.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Precision; may be repeated. Default: all.",
)
@click.option(
    "--engine", help="Engine for all precisions. Default: " + ", ".join(f"{p} {e}" for p, e in ENGINES.items()) + "."
)
@click.option("--count", type=click.IntRange(min=1), default=256, show_default=True, help="Pictures per distribution.")
@click.option(
    "--pictures",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Pictures that are compared one by one.",
)
@click.option(
    "--calibrate", type=click.IntRange(min=1), help="Pictures that int8 is calibrated on. Default: that of far export."
)
@click.option("--json", "json_file", type=FILE, help="Write the table as JSON too.")
def main(
    output: Path,
    checkpoint: Path,
    vae: Path,
    precisions: tuple[str, ...],
    engine: str | None,
    count: int,
    pictures: int,
    calibrate: int | None,
    json_file: Path | None,
) -> None:
    """Measure what every precision costs on a trained model, and exit with 1 beyond the limits."""
    from far_runtime.storage.atomic import check_folder, whole_file

    try:
        check_folder(output)
        rows = [
            measured(output, checkpoint, vae, precision, engine or ENGINES[precision], count, pictures, calibrate)
            for precision in precisions or PRECISIONS
        ]
    except (FarError, CheckFailed) as error:
        click.echo(f"error: {with_options(error)}", err=True)
        sys.exit(2 if isinstance(error, FarError) else 1)
    click.echo(table(rows))
    if json_file is not None:
        with whole_file(json_file) as aside:
            aside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        for failure in row["failures"]:
            click.echo(f"{row['precision']}: {failure}", err=True)
    if any(row["failures"] for row in rows):
        sys.exit(1)


def measured(
    output: Path, checkpoint: Path, vae: Path, precision: str, engine: str, count: int, pictures: int,
    calibrate: int | None,
) -> dict[str, Any]:  # fmt: skip
    """A row of the table, read from its file if it was measured for the same bundle, or measured now."""
    from far_export.cast import cast_stages
    from far_export.load import load_pair
    from far_export.torch_engine import Fp16Engine, TorchEngine
    from far_export.verify.distribution import check_distribution
    from far_export.verify.parity import SampleInputs, VerifyOptions, compare_engines
    from far_export.verify.reference import exporter_tolerances, reference_stages
    from far_runtime.conditioning.subjects import spread_subjects
    from far_runtime.engines import open_engine
    from far_runtime.sampling.settings import resolve_settings
    from far_runtime.storage.atomic import whole_file

    bundle = exported(output / precision, checkpoint, vae, precision, calibrate)
    file = output / f"{precision}-{engine.replace(':', '-')}.json"
    key = {"bundle": bundle.manifest.id, "engine": engine, "count": count, "pictures": pictures}
    if (finished := read(file)) is not None and finished["key"] == key:
        return finished
    model, decoder = (loaded.model for loaded in load_pair(checkpoint, vae))
    settings = resolve_settings(bundle.manifest)
    subjects = spread_subjects(bundle.manifest, pictures)
    click.echo(f"{precision}: {pictures} pictures on {engine} against torch", err=True)
    stages = reference_stages(bundle.manifest, model, decoder)
    if engine == HALF:
        again = (loaded.model for loaded in load_pair(checkpoint, vae))
        candidate: Any = Fp16Engine(cast_stages(reference_stages(bundle.manifest, *again), "fp16"))
    else:
        candidate = open_engine(bundle, engine)
    inputs = SampleInputs(subjects, range(pictures), settings)
    verify_options = VerifyOptions(tolerances=exporter_tolerances(stages, bundle.manifest))
    report = compare_engines(bundle, TorchEngine(stages), candidate, inputs, verify_options)
    distances = check_distribution(
        bundle, stages, candidate, settings, count, report=lambda line: click.echo(f"{precision}: {line}", err=True)
    )
    by_stage = {}
    for result in report.stages:
        worst = by_stage.setdefault(result.stage, {"error": 0.0, "one_minus_cosine": 0.0, "limit": result.tolerance})
        worst["error"] = max(worst["error"], result.error)
        worst["one_minus_cosine"] = max(worst["one_minus_cosine"], 1 - result.cosine)
    # Equal pictures have an infinite PSNR.
    qualities = [min(picture.psnr, 99.0) for picture in report.pictures]
    row = {
        "key": key,
        "precision": precision,
        "engine": report.candidate.text,
        "megabytes": sum(record.bytes for record in bundle.manifest.files.values()) / 1e6,
        "stages": by_stage,
        "psnr_mean": sum(qualities) / len(qualities),
        "psnr_worst": min(qualities),
        "distribution": distances.to_dict(),
        "failures": [*report.failures, *([] if distances.passed else [distances.sentence])],
    }
    with whole_file(file) as aside:
        aside.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row


def exported(folder: Path, checkpoint: Path, vae: Path, precision: str, calibrate: int | None) -> Bundle:
    """The bundle in `folder`, exported first where there is none or it is not complete."""
    from far_export.export import export_bundle
    from far_runtime.bundle import open_bundle

    try:
        return open_bundle(folder)
    except FarError:
        click.echo(f"{precision}: export", err=True)
        options = {"calibrate": calibrate} if precision == "int8" else {}
        return export_bundle(
            checkpoint,
            vae,
            folder,
            precision=precision,
            report=lambda line: click.echo(f"  {line}", err=True),
            **options,
        )


def read(file: Path) -> dict[str, Any] | None:
    """A row that was written before; None where there is none, or it is not complete."""
    try:
        row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return row if "key" in row else None
    except (OSError, ValueError):
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with a row per precision and stage."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for row in rows:
        for i, (stage, worst) in enumerate(row["stages"].items()):
            lines.append("| " + " | ".join(cells(row, stage, worst, first=i == 0)) + " |")
    return "\n".join(lines)


def cells(row: Mapping[str, Any], stage: str, worst: Mapping[str, float], first: bool) -> list[str]:
    """The cells of one row; those of the whole precision stand in its first row."""
    of_stage = [stage, f"{worst['error']:.1e}", f"{worst['limit']:.0e}", f"{worst['one_minus_cosine']:.1e}"]
    if not first:
        return ["", "", "", *of_stage, *[""] * 7]
    distance = row["distribution"]
    return [
        row["precision"], row["engine"], f"{row['megabytes']:.1f}", *of_stage,
        f"{row['psnr_mean']:.1f}", f"{row['psnr_worst']:.1f}", f"{distance['bundle']:.2f}",
        f"{distance['reference']:.2f}", f"{distance['ratio']:.3f}", f"{distance['paired']:.2f}",
        "FAIL" if row["failures"] else "ok",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
