"""`far edit`: a part of a picture drawn anew, or what lies around it. Libraries are imported where they are used, as in
`far generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engine
from far_runtime.cli.generate import PATH
from far_runtime.cli.option_names import with_options
from far_runtime.cli.sampling_options import sampling_options, subject_options, take_sampling
from far_runtime.images.metadata import MAX_BATCH

if TYPE_CHECKING:
    from far_runtime.bundle import Manifest
    from far_runtime.conditioning.subjects import Subject


@click.command(short_help="Draw a part of a picture anew.")
@click.argument("bundle", type=PATH)
@click.option(
    "--image",
    type=PATH,
    required=True,
    metavar="FILE",
    help="Picture to edit, of any size and kind: turned upright, laid on white where it is transparent, cropped around "
    "its middle to the shape it needs, and resized.",
)
@click.option(
    "--mask",
    type=PATH,
    metavar="FILE",
    help="White is drawn anew; black (and transparent) stays. As large as the picture.",
)
@click.option(
    "--outpaint",
    metavar="SIDE=N,...",
    help="Continue the picture instead: so many pixels of the result at its left, right, top, bottom, as "
    "left=16,top=8. The picture is shrunk into the rest.",
)
@click.option(
    "--feather",
    type=click.IntRange(0, 64),
    default=1,
    show_default=True,
    metavar="N",
    help="Pixels of transition, inside of what is drawn anew. 0: a hard edge.",
)
@subject_options("no class, or no text: the picture alone says what to draw")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures of each subject.")
@click.option("--seed", type=int, default=0, show_default=True, help="The pictures have the seeds SEED, SEED+1, ...")
@sampling_options
@click.option(
    "--batch-size",
    type=click.IntRange(1, MAX_BATCH),
    default=8,
    show_default=True,
    help="Pictures computed together.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    default="out.png",
    show_default=True,
    help="Contact sheet, a row per subject; a single picture is written as it is.",
)
@click.option("--each", type=PATH, metavar="DIR", help="Also write one PNG a picture, with its settings in it.")
@engine_options(BEST)
@click.option("--no-check", is_flag=True, help="Do not compare the bundle with its checksums first.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar and no report.")
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
    """Draw a part of a picture anew with BUNDLE: where a mask is white, or around the picture with --outpaint.

    Everything else stays as it is. With --label or --prompt the new part shows that; without, what goes with the rest.
    """
    started = time.perf_counter()
    if (mask is None) == (outpaint is None):
        beside = "both are given" if mask is not None else "neither is given"
        raise click.UsageError(f"--mask says what to draw anew, --outpaint what to add: use one; {beside}")
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
    sampling, (engine, engine_settings) = take_sampling(options), take_engine(options)
    plan = _read(image, mask, outpaint)
    opened = open_bundle(bundle, check=not no_check)
    name, why = resolve_engine(engine, opened)
    with Pipeline.over(opened, name, engine_settings) as pipeline:
        manifest = pipeline.bundle.manifest
        size = manifest.model.image_size
        subjects = subjects_of(manifest, labels, prompts, negative)
        if "guidance" in sampling and all(is_null(manifest, subject) for subject in subjects):
            raise click.UsageError("--guidance leads towards a --label or --prompt; give one, or leave it out")
        wanted = [(subject, seed + i) for subject in subjects for i in range(count)]
        outputs = Outputs(output, each)
        files = [("-o", output)]
        if each is not None:
            files += [("--each", each / name_of(*one)) for one in wanted]
        check_distinct(files, inputs)
        fitted = plan(size)
        outputs.check(len(subjects), count, size, size)
        with generation_bars(not quiet and sys.stderr.isatty()) as on_progress:
            made = pipeline.edit(
                [subject for subject, _ in wanted],
                [of_one for _, of_one in wanted],
                fitted.image,
                fitted.keep,
                edited={**fitted.source, "feather": str(feather)},
                batch_size=batch_size,
                on_progress=on_progress,
                **sampling,
            )
        for warning in made.warnings:
            click.echo(f"warning: {with_options(warning)}", err=True)
        lines = write(replace(made, images=compose(made.images, fitted, feather)), count, outputs)
        on_engine = f"{pipeline.engine.name} {pipeline.surroundings()['engine_version']}"
    if quiet:
        return
    share, seconds = fitted.change.mean(), time.perf_counter() - started
    lines = [*fitted.notes, *lines, f"{share:.0%} of the picture drawn anew, in {seconds:.2f} s, on {on_engine}"]
    click.echo("\n".join([*lines, *why]))


def _read(image: Path, mask: Path | None, outpaint: str | None) -> Any:
    """What makes the edit for a bundle's size; files and margins are read at once, so that what is wrong with them is
    said before a bundle is opened."""
    from functools import partial

    from far_runtime.images.edit import in_paint, out_paint, parse_margins
    from far_runtime.images.reading import read_mask, read_picture

    if mask is not None:
        return partial(in_paint, read_picture(image), read_mask(mask))
    margins = parse_margins(outpaint or "")
    return partial(out_paint, read_picture(image), margins)


def subjects_of(manifest: Manifest, labels: Sequence[str], prompts: Sequence[str], negative: str) -> list[Subject]:
    """The subjects given, each once, or the null one; FarError for those that the bundle does not have."""
    from far_runtime.conditioning.subjects import null_subject, resolve_subjects

    given = resolve_subjects(manifest, labels, prompts, negative)
    return list(dict.fromkeys(given)) or [null_subject(manifest, negative)]
