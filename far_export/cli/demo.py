"""`far demo`: export the zoo's model, draw with it, and verify it, to see everything work once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from PIL import Image

from far_runtime.bundle import Bundle
from far_runtime.cli.engine_options import BEST, resolve_engine
from far_runtime.conditioning.subjects import EXAMPLES, Subject, resolve_subjects, takes_text
from far_runtime.errors import CheckFailed, FarError
from far_runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from far_export.verify.results import Report

COLUMNS = 8
SHOWN = 64
LEVEL_PICTURES = 4
TEXT_MODEL = "far_t2i.safetensors"
MODELS = ("far.safetensors", TEXT_MODEL, "mar.safetensors", "var.safetensors")
VAES = ("vae.safetensors", "vqvae.safetensors")
PRESETS, PROMPTS, SHARED_VAE = "presets.json", "prompts.txt", "far-emoji"
"""Beside a model: its tuned presets, and where it draws from text, prompts, one a line. A folder without a VAE draws
through the one of SHARED_VAE."""

PATH = click.Path(path_type=Path)


@click.command(short_help="Export, draw and verify the model of models/zoo.")
@click.option("-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder of everything made.")
@click.option("--model", default="far-emoji", show_default=True, help="Name of a folder in the zoo.")
@click.option("--zoo", type=PATH, help="Folder of trained models. Default: models/zoo of the checkout.")
@click.option("--text-encoder", type=PATH, help="Hugging Face folder of the text encoder, for a model of prompts.")
@click.option("--engine", help=f"Engine that draws. Default: {BEST}.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def demo(output: Path, model: str, zoo: Path | None, text_encoder: Path | None, engine: str | None, seed: int) -> None:
    """Make a bundle of a small trained model, draw a picture of every class (of the first prompts, where it draws from
    text), show how pictures grow from low to high frequency, and verify the bundle against its checkpoint."""
    from far_export.export import export_bundle
    from far_export.tune.presets import read_presets
    from far_export.verify.html import write_html
    from far_runtime.storage.atomic import check_folder

    checkpoint, vae = zoo_files(zoo, model)
    if checkpoint.name == TEXT_MODEL and text_encoder is None:
        raise FarError(
            f"{model} draws from prompts; give --text-encoder DIR, a Hugging Face folder (its card names it)"
        )
    check_folder(output)
    parts: list[tuple[str, float, Path]] = []

    @contextmanager
    def part(text: str, result: Path) -> Iterator[None]:
        click.echo(f"{text} ...")
        started = time.perf_counter()
        yield
        parts.append((text, time.perf_counter() - started, result))

    def detail(line: str) -> None:
        click.echo(f"  {line}")

    with part("export", output / "bundle"):
        tuned = checkpoint.with_name(PRESETS)
        presets = read_presets(tuned) if tuned.exists() else None
        bundle = export_bundle(
            checkpoint, vae, output / "bundle", presets=presets, text_encoder=text_encoder, report=detail
        )
    subjects = demo_subjects(bundle, checkpoint.with_name(PROMPTS))
    engine, why = resolve_engine(engine, bundle)
    for line in why:
        detail(line)
    with Pipeline.from_bundle(output / "bundle", engine, check=False) as pipeline:
        each = "prompt" if takes_text(bundle.manifest) else "class"
        with part(f"draw one picture of every {each}", output / "samples.png"):
            detail(draw_samples(pipeline, output / "samples.png", subjects, seed))
        with part("draw the way from low to high frequency", output / "levels.png"):
            detail(draw_levels(pipeline, output, spread(subjects, LEVEL_PICTURES), seed))
    with part("verify against the checkpoint", output / "verify.html"):
        report = verify_demo(bundle, checkpoint, vae, text_encoder, engine, spread(subjects, 2), seed)
        write_html(report, output / "verify.html")
        verdict = "passed" if report.passed else "FAILED"
        detail(f"{verdict}: latents within {report.latents_error:.1e}, worst picture {report.worst_psnr:.1f} dB")
    width = max(len(text) for text, _, _ in parts)
    click.echo("")
    for text, seconds, result in parts:
        click.echo(f"{text:<{width}}  {seconds:6.1f} s  {result}")
    click.echo(f"{'all':<{width}}  {sum(seconds for _, seconds, _ in parts):6.1f} s")
    if not report.passed:
        raise CheckFailed(f"{report.failures[0]}; see {output / 'verify.html'}")


def zoo_files(zoo: Path | None, model: str) -> tuple[Path, Path]:
    """Checkpoint and VAE of a zoo model: in `zoo`, or in the checkout that far_models is imported from, or in
    ./models/zoo. FarError that names the models that are there."""
    import far_models

    places = [zoo] if zoo else [Path(far_models.__file__).parents[1] / "zoo", Path("models/zoo")]
    for place in places:
        checkpoints = [path for name in MODELS if (path := place / model / name).is_file()]
        vaes = [path for where in (model, SHARED_VAE) for name in VAES if (path := place / where / name).is_file()]
        if checkpoints and vaes:
            return checkpoints[0], vaes[0]
    names = sorted({path.parent.name for place in places for name in MODELS for path in place.glob(f"*/{name}")})
    raise FarError(
        f"no model {model!r} in {' or '.join(str(place) for place in places)}"
        + (f" (there: {', '.join(names)})" if names else "")
        + "; run far demo in a checkout of the project, or name the folder with --zoo"
    )


def demo_subjects(bundle: Bundle, prompts: Path) -> list[Subject]:
    """What the demo draws: the first classes, or the first prompts of a file, one a line."""
    if not takes_text(bundle.manifest):
        return resolve_subjects(bundle.manifest, range(min(bundle.manifest.model.classes, SHOWN)))
    lines = prompts.read_text(encoding="utf-8").splitlines() if prompts.is_file() else list(EXAMPLES)
    return resolve_subjects(bundle.manifest, prompts=[line for line in lines if line][:SHOWN])


def spread(subjects: Sequence[Subject], most: int) -> list[Subject]:
    """At most `most` subjects, evenly spread."""
    places = np.linspace(0, len(subjects) - 1, min(most, len(subjects))).round().astype(int)
    return [subjects[place] for place in places]


def draw_samples(pipeline: Pipeline, path: Path, subjects: Sequence[Subject], seed: int) -> str:
    """A sheet with one picture of every subject, named; returns a line about it."""
    from far_runtime.images.writing import picture_grid, save_sheet

    made = pipeline.generate(subjects, [seed] * len(subjects))
    names = [subject.name or str(subject.label) for subject in subjects]
    rows = [
        picture_grid(made.images[None, start : start + COLUMNS], [""], names[start : start + COLUMNS])
        for start in range(0, len(subjects), COLUMNS)
    ]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, sum(before.height for before in rows[:i])))
    save_sheet(path, sheet, made.settings)
    return f"{len(subjects)} pictures on {pipeline.engine.name}"


def draw_levels(pipeline: Pipeline, folder: Path, subjects: Sequence[Subject], seed: int) -> str:
    """levels.png and levels.webp of some subjects in `folder`; returns a line about them."""
    from far_runtime.cli.outputs import write_levels

    made = pipeline.generate(subjects, [seed] * len(subjects), save_levels=True)
    write_levels(made, 1, folder / "levels.png", folder / "levels.webp")
    return f"{len(subjects)} pictures at {len(made.step_names)} levels, also as an animation: levels.webp"


def verify_demo(
    bundle: Bundle, checkpoint: Path, vae_file: Path, text_encoder: Path | None, engine: str,
    subjects: Sequence[Subject], seed: int,
) -> Report:  # fmt: skip
    """Verify a picture of each subject."""
    from far_export.load import load_pair
    from far_export.verify.parity import SampleInputs, verify_bundle
    from far_export.verify.reference import reference_text
    from far_runtime.sampling.settings import resolve_settings

    model, vae = load_pair(checkpoint, vae_file)
    text = reference_text(bundle.manifest, model, text_encoder)
    inputs = SampleInputs(subjects, [seed] * len(subjects), resolve_settings(bundle.manifest))
    return verify_bundle(bundle, model.model, vae.model, engine, inputs, text=text)
