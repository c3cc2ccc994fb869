"""`far demo`: export a small trained model, draw with it and verify it."""

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
    from far_runtime.engines.select import Choice

COLUMNS = 8
"""Pictures in a row of the sheet of samples."""
MAX_SAMPLES = 64
LEVEL_PICTURES = 4
"""Pictures that are shown at every level."""
VERIFY_PICTURES = 2
TEXT_MODEL = "far_t2i.safetensors"
MODELS = ("far.safetensors", TEXT_MODEL, "mar.safetensors", "var.safetensors")
VAES = ("vae.safetensors", "vqvae.safetensors")
PRESETS = "presets.json"
"""File with a model's tuned presets, in its folder."""
PROMPTS = "prompts.txt"
"""File with prompts, one per line, in the folder of a model that draws from text."""
SHARED_VAE = "far-emoji"
"""The folder whose VAE a model without its own uses."""

PATH = click.Path(path_type=Path)


@click.command(short_help="Export, draw and verify the model of models/zoo.")
@click.option("-o", "--output", type=PATH, default=Path("demo"), show_default=True, help="Folder for the results.")
@click.option("--model", default="far-emoji", show_default=True, help="Name of a model's folder in the zoo.")
@click.option("--zoo", type=PATH, help="Folder of the trained models. Default: models/zoo of the checkout.")
@click.option("--text-encoder", type=PATH, help="Hugging Face folder of the text encoder, for a model of prompts.")
@click.option("--engine", help=f"Engine to draw with. Default: {BEST}.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all pictures.")
def demo(output: Path, model: str, zoo: Path | None, text_encoder: Path | None, engine: str | None, seed: int) -> None:
    """Export a small trained model as a bundle, draw a picture of every class (or of the first prompts), show how
    pictures grow from low to high frequency, and verify the bundle against the checkpoint."""
    from far_export.verify.html import write_html
    from far_runtime.storage.atomic import check_folder

    checkpoint, vae = zoo_files(zoo, model)
    if checkpoint.name == TEXT_MODEL and text_encoder is None:
        raise FarError(
            f"{model} draws from prompts; give --text-encoder DIR, a Hugging Face folder (its card names it)"
        )
    check_folder(output)
    timings = Timings()
    with timings.part("export", output / "bundle"):
        bundle = export_demo(output / "bundle", checkpoint, vae, text_encoder)
    subjects = demo_subjects(bundle, checkpoint.with_name(PROMPTS))
    choice, reasons = resolve_engine(engine, bundle)
    for line in reasons:
        detail(line)
    with Pipeline.from_bundle(output / "bundle", choice, check=False) as pipeline:
        subject = "prompt" if takes_text(bundle.manifest) else "class"
        with timings.part(f"draw one picture of every {subject}", output / "samples.png"):
            detail(draw_samples(pipeline, output / "samples.png", subjects, seed))
        with timings.part("draw the way from low to high frequency", output / "levels.png"):
            detail(draw_levels(pipeline, output, spread(subjects, LEVEL_PICTURES), seed))
    with timings.part("verify against the checkpoint", output / "verify.html"):
        report = verify_demo(bundle, checkpoint, vae, text_encoder, choice, spread(subjects, VERIFY_PICTURES), seed)
        write_html(report, output / "verify.html")
        result = "passed" if report.passed else "FAILED"
        detail(f"{result}: latents within {report.latents_error:.1e}, worst picture {report.worst_psnr:.1f} dB")
    timings.print()
    if not report.passed:
        raise CheckFailed(f"{report.failures[0]}; see {output / 'verify.html'}")


class Timings:
    """How long the parts of the demo take, and what each of them makes."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, float, Path]] = []

    @contextmanager
    def part(self, title: str, result: Path) -> Iterator[None]:
        """Print the title, and measure the block, which makes `result`."""
        click.echo(f"{title} ...")
        start = time.perf_counter()
        yield
        self._parts.append((title, time.perf_counter() - start, result))

    def print(self) -> None:
        """Print a table of all parts and their sum."""
        width = max(len(title) for title, _, _ in self._parts)
        click.echo("")
        for title, seconds, result in self._parts:
            click.echo(f"{title:<{width}}  {seconds:6.1f} s  {result}")
        click.echo(f"{'all':<{width}}  {sum(seconds for _, seconds, _ in self._parts):6.1f} s")


def detail(line: str) -> None:
    """Print a line below the title of a part."""
    click.echo(f"  {line}")


def zoo_files(zoo: Path | None, model: str) -> tuple[Path, Path]:
    """Checkpoint and VAE of a model in the zoo: `zoo`, else that of the checkout of far_models, else ./models/zoo.

    Raises FarError, naming the models that are there, where the zoo does not have it.
    """
    import far_models

    folders = [zoo] if zoo else [Path(far_models.__file__).parents[1] / "zoo", Path("models/zoo")]
    for folder in folders:
        checkpoints = [path for name in MODELS if (path := folder / model / name).is_file()]
        vaes = [path for owner in (model, SHARED_VAE) for name in VAES if (path := folder / owner / name).is_file()]
        if checkpoints and vaes:
            return checkpoints[0], vaes[0]
    names = sorted({path.parent.name for folder in folders for name in MODELS for path in folder.glob(f"*/{name}")})
    raise FarError(
        f"no model {model!r} in {' or '.join(map(str, folders))}"
        + (f" (there: {', '.join(names)})" if names else "")
        + "; run far demo in a checkout of the project, or name the folder with --zoo"
    )


def export_demo(target: Path, checkpoint: Path, vae: Path, text_encoder: Path | None) -> Bundle:
    """Export a model with its tuned presets, if it has any."""
    from far_export.export import export_bundle
    from far_export.tune.presets import read_presets

    file = checkpoint.with_name(PRESETS)
    presets = read_presets(file) if file.exists() else None
    return export_bundle(checkpoint, vae, target, presets=presets, text_encoder=text_encoder, report=detail)


def demo_subjects(bundle: Bundle, prompts: Path) -> list[Subject]:
    """What the demo draws: the first classes, or the first prompts of a file with one per line."""
    if not takes_text(bundle.manifest):
        return resolve_subjects(bundle.manifest, range(min(bundle.manifest.model.classes, MAX_SAMPLES)))
    lines = prompts.read_text(encoding="utf-8").splitlines() if prompts.is_file() else list(EXAMPLES)
    return resolve_subjects(bundle.manifest, prompts=[line for line in lines if line][:MAX_SAMPLES])


def spread(subjects: Sequence[Subject], count: int) -> list[Subject]:
    """At most `count` of the subjects, evenly spaced."""
    indices = np.linspace(0, len(subjects) - 1, min(count, len(subjects))).round().astype(int)
    return [subjects[i] for i in indices]


def draw_samples(pipeline: Pipeline, path: Path, subjects: Sequence[Subject], seed: int) -> str:
    """Write a sheet with one picture of every subject and its name; returns a line about it."""
    from far_runtime.images.writing import picture_grid, save_sheet

    generation = pipeline.generate(subjects, [seed] * len(subjects))
    names = [subject.name or str(subject.label) for subject in subjects]
    rows = [
        picture_grid(generation.images[None, start : start + COLUMNS], [""], names[start : start + COLUMNS])
        for start in range(0, len(subjects), COLUMNS)
    ]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, sum(before.height for before in rows[:i])))
    save_sheet(path, sheet, generation.settings)
    return f"{len(subjects)} pictures on {pipeline.engine.name}"


def draw_levels(pipeline: Pipeline, folder: Path, subjects: Sequence[Subject], seed: int) -> str:
    """Write levels.png and levels.webp of some subjects to `folder`; returns a line about them."""
    from far_runtime.cli.outputs import write_levels

    generation = pipeline.generate(subjects, [seed] * len(subjects), save_levels=True)
    write_levels(generation, 1, folder / "levels.png", folder / "levels.webp")
    return f"{len(subjects)} pictures at {len(generation.step_names)} levels, also as an animation: levels.webp"


def verify_demo(
    bundle: Bundle, checkpoint: Path, vae_file: Path, text_encoder: Path | None, engine: Choice,
    subjects: Sequence[Subject], seed: int,
) -> Report:  # fmt: skip
    """Verify the bundle with a picture of each subject."""
    from far_export.load import load_pair
    from far_export.verify.parity import SampleInputs, verify_bundle
    from far_export.verify.reference import reference_text
    from far_runtime.sampling.settings import resolve_settings

    model, vae = load_pair(checkpoint, vae_file)
    text = reference_text(bundle.manifest, model, text_encoder)
    inputs = SampleInputs(subjects, [seed] * len(subjects), resolve_settings(bundle.manifest))
    return verify_bundle(bundle, model.model, vae.model, engine, inputs, text=text)
