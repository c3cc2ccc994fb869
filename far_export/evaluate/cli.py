"""`far evaluate`: how good a bundle's pictures are, or the pictures of a benchmark's prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli_engine import BEST, best_unless, engine_options, take_engine
from far_runtime.cli_sampling import sampling_options, take_sampling
from far_runtime.settings import MAX_BATCH

if TYPE_CHECKING:
    from rich.table import Table

    from far_export.evaluate.figures import Figures
    from far_export.evaluate.networks import Extractor
    from far_export.evaluate.reference import Reference
    from far_runtime.bundle import Bundle
    from far_runtime.subjects import Subject

PATH = click.Path(path_type=Path)
DEFAULT_COUNT = 50_000


@click.command(short_help="Measure how good a bundle's pictures are (needs torch).")
@click.argument("bundle", type=PATH)
@click.option(
    "--reference",
    "references",
    multiple=True,
    metavar="DIR[:PART]|FILE.npz",
    help="Pictures, or statistics (adm_in256_stats.npz), to compare with; may be repeated. PART: train, held_out or "
    "all, of a folder with split.json.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    help=f"Pictures to draw, every class equally often. Default: {DEFAULT_COUNT}; with --prompts, prompts: all (COCO: "
    "30,000).",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picture i has the seed SEED + i."
)
@click.option(
    "--prompts",
    type=PATH,
    metavar="FILE",
    help="Draw a benchmark's prompts into the folders that its scorer reads: GenEval's evaluation_metadata.jsonl, "
    "COCO's captions_val2014.json, or a text file with a prompt a line.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Pictures of each prompt. Default: 1; GenEval: 4.")
@click.option(
    "--inception",
    type=PATH,
    metavar="FILE",
    help="Your Inception weights, for FID: inception-2015-12-05.pt (TorchScript, which is a program: take it from a "
    "source that you trust), or pt_inception-2015-12-05-6726825d.pth where torch-fidelity is installed. Default: the "
    "features of efficientnet-lite0, whose figures are no FID.",
)
@click.option(
    "--floor",
    type=PATH,
    metavar="VAE",
    help="VAE checkpoint: also measure its reconstructions of the references' pictures, the best that can be had.",
)
@click.option("--images", is_flag=True, help="Keep the pictures, in OUT/pictures; else only their features are kept.")
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=Path("evaluation"),
    show_default=True,
    help="Folder of figures and of what was drawn, from which a run that was ended goes on.",
)
@click.option(
    "--batch-size", type=click.IntRange(1, MAX_BATCH), default=8, show_default=True, help="Pictures computed together."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@sampling_options
@engine_options(BEST)
def evaluate(
    bundle: Path,
    references: tuple[str, ...],
    count: int | None,
    seed: int,
    prompts: Path | None,
    samples: int | None,
    inception: Path | None,
    floor: Path | None,
    images: bool,
    output: Path,
    batch_size: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw pictures from BUNDLE and compare them with references: Frechet distance, inception score, precision and
    recall. A run that is ended goes on where it was when it is started again."""
    from far_export.evaluate import networks
    from far_export.evaluate.draw import Run
    from far_export.evaluate.figures import figures, floor_of
    from far_export.evaluate.reference import open_reference
    from far_models.checkpoint import load_checkpoint
    from far_runtime.bundle import open_bundle
    from far_runtime.defaults import check_system, settings_of
    from far_runtime.files import check_folder, whole_file
    from far_runtime.pipeline import Pipeline

    opened = open_bundle(bundle)
    check_system(opened)
    subjects, files, write_notes = _subjects(opened, prompts, count, samples, references)
    if files is None and images:
        files = [f"pictures/{seed + i:07d}.png" for i in range(len(subjects))]
    check_folder(output)
    sampling, (engine, engine_settings) = take_sampling(options), take_engine(options)
    settings = settings_of(opened.manifest, sampling)
    vae = load_checkpoint(floor, expect=_vae_kind(opened)).model if floor else None
    network = None
    if references:
        network = networks.inception(inception) if inception else networks.lite()
    size = opened.manifest.model["image_size"]
    against = [open_reference(text, size, network, _say) for text in references] if network else []
    name, why = best_unless(engine, opened)
    with Pipeline.over(opened, name, engine_settings) as pipeline:
        facts = {
            "bundle": opened.manifest.id, "engine": pipeline.engine.name, "seed": seed, "settings": settings,
            "engine_version": pipeline.surroundings()["engine_version"],
            "prompts": _digest(subjects) if prompts else None, "network": network.digest if network else None,
        }  # fmt: skip
        run = Run(output, facts)
        run.begin()
        write_notes(output)
        file_of = (lambda i: output / files[i]) if files else None
        missing = run.missing(len(subjects), network is not None, file_of)
        if missing < len(subjects):
            _say(f"going on: {len(subjects) - missing} of {len(subjects)} pictures are there")

        def draw(numbers: Sequence[int]) -> Any:
            wanted, seeds = [subjects[i] for i in numbers], [seed + i for i in numbers]
            return pipeline.generate(wanted, seeds, batch_size=batch_size, **sampling).images

        with _progress(len(subjects)) as report:
            found = run.drawn(len(subjects), draw, network, report, file_of)
    if found is None or network is None:
        _say(f"{output}: {len(subjects)} pictures")
        return
    floors = _floors(vae, against, network, floor_of)
    made = figures(found, against, network, floors, facts)
    with whole_file(output / "evaluate.json") as aside:
        aside.write_text(json.dumps(made.to_dict(), indent=1) + "\n", encoding="utf-8")
    _print(made, as_json, [*why, f"figures: {output / 'evaluate.json'}"])


def _subjects(
    opened: Bundle, prompts: Path | None, count: int | None, samples: int | None, references: tuple[str, ...]
) -> tuple[list[Subject], list[str] | None, Callable[[Path], None]]:
    """What to draw, the names of the pictures' files if they have any yet, and what else to write."""
    from far_export.evaluate.prompts import read_prompts
    from far_runtime.errors import FarError
    from far_runtime.subjects import resolve_subjects, takes_text

    text = takes_text(opened.manifest)
    if text and prompts is None:
        raise FarError(f"{opened.path}: draws from text; give it prompts: --prompts FILE")
    if prompts is not None:
        if not text:
            raise FarError(f"{opened.path}: draws from class labels; leave out --prompts and give --reference")
        found = read_prompts(prompts, count, samples)
        return resolve_subjects(opened.manifest, prompts=found.prompts), list(found.names), found.write_notes
    if samples is not None:
        raise FarError("--samples is for --prompts; use --count for classes")
    if not references:
        raise FarError("nothing to compare with; give --reference DIR, or statistics: --reference FILE.npz")
    classes = opened.manifest.model["classes"]
    numbers = [i % classes for i in range(count or DEFAULT_COUNT)]
    if len(numbers) % classes:
        _say(f"{len(numbers)} pictures of {classes} classes: some classes have one more than others")
    return resolve_subjects(opened.manifest, numbers), None, lambda folder: None


def _vae_kind(opened: Bundle) -> str:
    from far_export.graphs import SYSTEMS

    return SYSTEMS[opened.manifest.system].vae


def _digest(subjects: Sequence[Subject]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(one.name for one in subjects).encode()).hexdigest()


def _floors(vae: Any, against: Sequence[Reference], network: Extractor, floor_of: Callable[..., Any]) -> dict[str, Any]:
    """Features of the reconstructions of every reference's pictures."""
    if vae is None:
        return {}
    found = {}
    for reference in against:
        features = floor_of(vae, reference, network)
        if features is None:
            _say(f"{reference.name}: has no pictures to reconstruct, so it has no floor")
        else:
            found[reference.name] = features
    return found


def _say(line: str) -> None:
    click.echo(line, err=True)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line for every tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        told = 0

        def line(done: int, of: int) -> None:
            nonlocal told
            if 10 * done // of > told:
                told = 10 * done // of
                _say(f"{done} of {of} pictures")

        yield line
        return
    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=total)
        yield lambda done, of: bars.update(task, completed=done)


def _print(made: Figures, as_json: bool, lines: Sequence[str]) -> None:
    from rich.console import Console

    if as_json:
        click.echo(json.dumps(made.to_dict()))
        return
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print(table(made))
    score = "inception score" if made.inception else f"score by {made.network}'s classes (no inception score)"
    console.print(f"{score}: {made.score:.2f} ± {made.score_deviation:.2f}", markup=False)
    missing = dict.fromkeys(f"{one.reference}: {why}" for one in made.against for why in one.missing)
    for line in (*missing, *lines):
        console.print(line, markup=False, soft_wrap=True)


def table(made: Figures) -> Table:
    """A row per reference."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    what = "features of Inception" if made.inception else f"features of {made.network}: no FID"
    shown = Table(title=f"{made.count} pictures, {what}", box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    shown.add_column("reference")
    for column in ("pictures", "FID" if made.inception else "Frechet", "floor", "on 48", "floor", "x floor"):
        shown.add_column(column, justify="right")
    for column in ("precision", "recall"):
        shown.add_column(column, justify="right")
    for one in made.against:
        ratio = one.frechet_48 / one.floor_48 if one.frechet_48 and one.floor_48 else None
        shown.add_row(
            one.reference, "" if one.reference_pictures is None else str(one.reference_pictures),
            *(_number(value, ".2f") for value in (one.frechet, one.floor, one.frechet_48, one.floor_48, ratio)),
            *(_number(value, ".3f") for value in (one.precision, one.recall)),
        )  # fmt: skip
    return shown


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
