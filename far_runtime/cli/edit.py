"""`far edit`: redraw a part of a picture, or extend it.

Libraries are imported where they are used, so that --help and wrong options are answered at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engine
from far_runtime.cli.generate import PATH
from far_runtime.cli.option_names import with_options
from far_runtime.cli.sampling_options import generation_options, subject_options, take_sampling

if TYPE_CHECKING:
    from far_runtime.bundle import Manifest
    from far_runtime.conditioning.subjects import Subject
    from far_runtime.images.edit import Edit


@click.command(short_help="Redraw a part of a picture, or extend it.")
@click.argument("bundle", type=PATH)
@click.option(
    "--image",
    type=PATH,
    required=True,
    metavar="FILE",
    help="Picture to edit, of any size and format. It is turned upright, put on white where it is transparent, cropped "
    "around its centre to the shape of the bundle's pictures, and resized.",
)
@click.option(
    "--mask",
    type=PATH,
    metavar="FILE",
    help="Mask of the same size as the picture: white is redrawn, black and transparent stay.",
)
@click.option(
    "--outpaint",
    metavar="SIDE=N,...",
    help="Extend the picture instead, by N pixels of the result at each SIDE (left, right, top, bottom), such as "
    "left=16,top=8. The picture is shrunk into the rest.",
)
@click.option(
    "--feather",
    type=click.IntRange(0, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="Width of the transition in pixels, inside the redrawn part. 0: a hard edge.",
)
@subject_options("none; what is drawn follows from the picture alone")
@generation_options("Seed of the first picture; the next ones have SEED+1, SEED+2, ...")
@engine_options(BEST)
@click.option("--no-check", is_flag=True, help="Do not compare the bundle with its checksums first.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no report.")
def edit(
    bundle: Path,
    image: Path,
    mask: Path | None,
    outpaint: str | None,
    feather: int,
    labels: tuple[str, ...],
    prompts: tuple[str, ...],
    negative: str,
    count: int,
    seed: int,
    batch_size: int,
    output: Path,
    each: Path | None,
    no_check: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Redraw a part of a picture with BUNDLE where --mask is white, or extend the picture with --outpaint.

    The rest of the picture stays as it is. The new part shows the --label or --prompt; without either, what fits the
    rest. The defaults of the sampling settings (--preset to --more-smooth) are those of the bundle.
    """
    started = time.perf_counter()
    if (mask is None) == (outpaint is None):
        number = "both are given" if mask is not None else "neither is given"
        raise click.UsageError(f"--mask says what to redraw, --outpaint what to add: use one; {number}")
    from far_runtime.bundle import open_bundle
    from far_runtime.cli.outputs import Outputs, check_sheet, write
    from far_runtime.conditioning.subjects import is_null
    from far_runtime.images.edit import compose
    from far_runtime.images.writing import name_of
    from far_runtime.pipeline import Pipeline
    from far_runtime.progress import generation_bars
    from far_runtime.storage.atomic import check_distinct

    check_sheet(output)
    inputs = {"--image": image} if mask is None else {"--image": image, "--mask": mask}
    check_distinct([("-o", output)], inputs)
    sampling, (engine, engine_options) = take_sampling(options), take_engine(options)
    prepare = _read_inputs(image, mask, outpaint)
    opened = open_bundle(bundle, check=not no_check)
    choice, notes = resolve_engine(engine, opened)
    with Pipeline.over(opened, choice, engine_options) as pipeline:
        manifest = pipeline.bundle.manifest
        size = manifest.model.image_size
        subjects = subjects_of(manifest, labels, prompts, negative)
        if "guidance" in sampling and all(is_null(manifest, subject) for subject in subjects):
            raise click.UsageError("--guidance leads towards a --label or --prompt; give one, or leave it out")
        pictures = [(subject, seed + i) for subject in subjects for i in range(count)]
        outputs = Outputs(output, each)
        files = [("-o", output)]
        if each is not None:
            files += [("--each", each / name_of(*picture)) for picture in pictures]
        check_distinct(files, inputs)
        prepared = prepare(size)
        outputs.check(len(subjects), count, size, size)
        with generation_bars(not quiet and sys.stderr.isatty()) as on_progress:
            generation = pipeline.edit(
                [subject for subject, _ in pictures],
                [picture_seed for _, picture_seed in pictures],
                prepared.image,
                prepared.keep,
                edited={**prepared.source, "feather": str(feather)},
                batch_size=batch_size,
                on_progress=on_progress,
                **sampling,
            )
        for warning in generation.warnings:
            click.echo(f"warning: {with_options(warning)}", err=True)
        lines = write(replace(generation, images=compose(generation.images, prepared, feather)), count, outputs)
        on_engine = f"{pipeline.engine.name} {pipeline.surroundings()['engine_version']}"
    if quiet:
        return
    share, seconds = prepared.change.mean(), time.perf_counter() - started
    lines = [*prepared.notes, *lines, f"{share:.0%} of the picture redrawn, in {seconds:.2f} s, on {on_engine}"]
    click.echo("\n".join([*lines, *notes]))


def _read_inputs(image: Path, mask: Path | None, outpaint: str | None) -> Callable[[int], Edit]:
    """Read the picture and the mask or margins; returns a function that fits them to a bundle's image size in pixels.

    The size is known only after the bundle is opened, and bad files are reported before that.
    """
    from functools import partial

    from far_runtime.images.edit import in_paint, out_paint, parse_margins
    from far_runtime.images.reading import read_mask, read_picture

    if mask is not None:
        return partial(in_paint, read_picture(image), read_mask(mask))
    margins = parse_margins(outpaint or "")
    return partial(out_paint, read_picture(image), margins)


def subjects_of(manifest: Manifest, labels: Sequence[str], prompts: Sequence[str], negative: str) -> list[Subject]:
    """The subjects of the options, each once, or the null subject; FarError for one that the bundle does not have."""
    from far_runtime.conditioning.subjects import null_subject, resolve_subjects

    subjects = resolve_subjects(manifest, labels, prompts, negative)
    return list(dict.fromkeys(subjects)) or [null_subject(manifest, negative)]
