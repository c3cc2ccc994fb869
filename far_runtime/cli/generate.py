"""`far generate`: pictures from a bundle.

Libraries are imported where they are used, so that --help and wrong options are answered at once.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, is_given, resolve_engine, take_engine
from far_runtime.cli.option_names import with_options
from far_runtime.cli.sampling_options import generation_options, subject_options, take_sampling
from far_runtime.sampling.options import SETTINGS

if TYPE_CHECKING:
    from far_runtime.generation import Generation
    from far_runtime.images.metadata import PictureMetadata

PATH = click.Path(path_type=Path)
DEFAULT_LABELS = 8
FROM_PICTURE = ("labels", "prompts", "negative", "count", "seed", "batch_size", *SETTINGS)
"""Parameters that --like reads from the picture's file."""


@click.command(short_help="Draw pictures from a bundle.")
@click.argument("bundle", type=PATH)
@subject_options("the first eight classes")
@generation_options(
    "Seed of the first picture of each subject; the next ones have SEED+1, SEED+2, ... A picture stays the same "
    "when labels or pictures are added."
)
@click.option(
    "--save-levels",
    is_flag=False,
    flag_value="",
    metavar="[PREFIX|DIR]",
    help="Also write the steps from low to high frequency, as a strip (PREFIX.png) and an animation (PREFIX.webp). "
    "Default without a value: beside the contact sheet. Write --save-levels=PREFIX, with the equals sign: a word after "
    "the bare option is read as its value.",
)
@click.option(
    "--like",
    type=PATH,
    metavar="PNG",
    help="Draw the picture of this file again, bit for bit, from the settings in it.",
)
@engine_options(f"{BEST}; with --like, the picture's")
@click.option("--no-check", is_flag=True, help="Do not compare the bundle with its checksums first.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no report.")
@click.pass_context
def generate(
    ctx: click.Context,
    /,
    bundle: Path,
    labels: tuple[str, ...],
    prompts: tuple[str, ...],
    negative: str,
    count: int,
    seed: int,
    batch_size: int,
    output: Path,
    each: Path | None,
    save_levels: str | None,
    like: Path | None,
    no_check: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Draw pictures of labels or prompts from BUNDLE, a folder that far export has made.

    The defaults of the sampling settings (--preset to --more-smooth) are those of the bundle.
    """
    started = time.perf_counter()
    from far_runtime.bundle import open_bundle
    from far_runtime.cli.outputs import Outputs, check_sheet, level_files, write
    from far_runtime.conditioning.subjects import default_subjects, resolve_subjects
    from far_runtime.images.writing import name_of, read_metadata
    from far_runtime.pipeline import Pipeline
    from far_runtime.progress import generation_bars
    from far_runtime.sampling.presets import preset_of

    check_sheet(output)
    sampling, (engine, engine_options) = take_sampling(options), take_engine(options)
    outputs = Outputs(output, each, None if save_levels is None else level_files(save_levels, output))
    original = None
    if like is not None:
        _refuse_beside_like(ctx)
        original = read_metadata(like)
        engine_options = replace(engine_options, threads=engine_options.threads or original.threads)
    outputs.check_distinct((), like)
    engine = engine or _engine_of(original)
    opened = open_bundle(bundle, check=not no_check)
    choice, notes = resolve_engine(engine, opened)
    with Pipeline.over(opened, choice, engine_options) as pipeline:
        manifest = pipeline.bundle.manifest
        if original is not None and like is not None:
            _warn_of_differences(like, original.differences(pipeline.surroundings()))
            pictures = [(pipeline.subjects([original.subject])[0], original.seed)]
            rows, columns, draw = 1, 1, partial(pipeline.like, original)
        else:
            subjects = resolve_subjects(manifest, labels, prompts, negative)
            subjects = list(dict.fromkeys(subjects)) or default_subjects(manifest, DEFAULT_LABELS)
            rows, columns = len(subjects), count
            if "preset" in sampling:
                notes = [preset_of(manifest, sampling["preset"]).line, *notes]
            pictures = [(subject, seed + i) for subject in subjects for i in range(count)]
            draw = partial(pipeline.generate, *zip(*pictures, strict=True), batch_size=batch_size, **sampling)
        outputs.check_distinct((name_of(*picture) for picture in pictures), like)
        size = manifest.model.image_size
        outputs.check(rows, columns, size, size)
        with generation_bars(not quiet and sys.stderr.isatty()) as on_progress:
            generation = draw(on_progress=on_progress, save_levels=save_levels is not None)
        for warning in generation.warnings:
            click.echo(f"warning: {with_options(warning)}", err=True)
        lines = write(generation, columns, outputs)
        on_engine = f"{pipeline.engine.name} {pipeline.surroundings()['engine_version']}"
    if quiet:
        return
    if like is not None:
        lines.append(comparison(like, generation))
    number, seconds = len(pictures), time.perf_counter() - started
    several = f"{number} pictures in {seconds:.2f} s, {seconds / number:.2f} s each"
    lines.append(f"{f'one picture in {seconds:.2f} s' if number == 1 else several}, on {on_engine}")
    click.echo("\n".join([*lines, *notes]))


def _refuse_beside_like(ctx: click.Context) -> None:
    """UsageError for options on the command line that --like reads from the picture."""
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in FROM_PICTURE and is_given(ctx, parameter)
    ]
    if given:
        raise click.UsageError(f"--like takes {', '.join(given)} from the picture; leave out one or the other", ctx)


def _engine_of(picture: PictureMetadata | None) -> str | None:
    """The engine that drew a picture; None for no picture, and for an engine of another package."""
    from far_runtime.engines import ENGINES

    return picture.engine if picture is not None and picture.engine.partition(":")[0] in ENGINES else None


def _warn_of_differences(like: Path, differences: list[str]) -> None:
    """Warn where bundle, engine or machine differ from those of the picture."""
    if differences:
        click.echo(f"warning: {like}: its bits may not come back: {'; '.join(differences)}", err=True)


def comparison(like: Path, generation: Generation) -> str:
    """A line that says whether the repeated picture has the same pixels."""
    import numpy as np
    from PIL import Image

    with Image.open(like) as image:
        before = np.asarray(image.convert("RGB"))
    if before.shape != generation.images[0].shape:
        return f"{like}: was {before.shape[1]} x {before.shape[0]} pixels, the new one is of another size"
    changed = int((before != generation.images[0]).any(axis=-1).sum())
    return f"{like}: {'repeated bit for bit' if changed == 0 else f'{changed} of its pixels came out differently'}"
