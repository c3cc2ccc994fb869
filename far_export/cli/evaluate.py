"""`far evaluate`: how good a bundle's pictures are, or the pictures of a benchmark's prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engine
from far_runtime.cli.sampling_options import sampling_options, take_sampling
from far_runtime.images.metadata import MAX_BATCH

if TYPE_CHECKING:
    from far_export.evaluate.features import Extractor
    from far_export.evaluate.figures import Figures
    from far_runtime.bundle import Bundle
    from far_runtime.conditioning.subjects import Subject

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
@click.option(
    "--images",
    is_flag=True,
    help="Keep the pictures, in OUT/pictures; else only their features. With --prompts: always.",
)
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
    import numpy
    import torch

    from far_export.evaluate.figures import figures
    from far_export.evaluate.floor import open_floor
    from far_export.evaluate.reference import open_reference
    from far_export.evaluate.run import Run
    from far_export.stages import SYSTEMS
    from far_runtime import __version__
    from far_runtime.bundle import open_bundle
    from far_runtime.errors import FarError
    from far_runtime.pipeline import Pipeline
    from far_runtime.progress import progress, say
    from far_runtime.sampling.settings import check_system, resolve_settings
    from far_runtime.storage.atomic import check_folder, whole_file

    for option, given in (("--floor", floor), ("--inception", inception)):
        if given and not references:
            raise FarError(f"{option} is for comparisons; give --reference too, or leave it out")
    opened = open_bundle(bundle)
    check_system(opened)
    plan = _plan(opened, prompts, count, samples, references, seed, images)
    check_folder(output)
    sampling, (engine, engine_settings) = take_sampling(options), take_engine(options)
    settings = resolve_settings(opened.manifest, sampling)
    vae = open_floor(floor, SYSTEMS[opened.manifest.system].vae) if floor else None
    network = _network(inception) if references else None
    size = opened.manifest.model.image_size
    against = [open_reference(text, size, network, progress) for text in references] if network else []
    name, why = resolve_engine(engine, opened)
    with Pipeline.over(opened, name, engine_settings) as pipeline:
        facts = {
            "bundle": opened.manifest.id, "engine": pipeline.engine.name,
            "engine_version": pipeline.surroundings()["engine_version"], "version": __version__, "seed": seed,
            "settings": settings, **plan.facts,
        }  # fmt: skip
        files = [output / file for file in plan.files] if plan.files else None
        run = Run(output, facts, len(plan.subjects), batch_size, files, network)
        run.begin()
        plan.write_notes(output)
        told: set[str] = set()

        def draw(numbers: range) -> Any:
            wanted = plan.subjects[numbers.start : numbers.stop]
            made = pipeline.generate(wanted, [seed + i for i in numbers], batch_size=batch_size, **sampling)
            for warning in made.warnings:
                if warning not in told:
                    told.add(warning)
                    say(f"warning: {warning}")
            return made.images

        found = run.drawn(draw, progress)
    if found is None or network is None:
        say(f"{output}: {len(plan.subjects)} pictures")
        return
    floors = [vae.features(reference, network, progress) if vae else None for reference in against]
    versions = {"torch": torch.__version__, "numpy": numpy.__version__}
    how = {**facts, **versions, "network": network.digest, "floor": vae.digest if vae else None}
    made = figures(found, against, network, floors, how)
    with whole_file(output / "evaluate.json") as aside:
        aside.write_text(json.dumps(made.to_dict(), indent=1) + "\n", encoding="utf-8")
    _print(made, as_json, [*why, f"figures: {output / 'evaluate.json'}"])


@dataclass(frozen=True)
class Plan:
    """What to draw. files: of the pictures, relative to the output folder. facts: what tells it from another plan.
    write_notes: writes what else belongs into the folder."""

    subjects: Sequence[Subject]
    files: Sequence[str] | None
    facts: Mapping[str, Any]
    write_notes: Callable[[Path], None] = lambda folder: None


def _plan(
    opened: Bundle,
    prompts: Path | None,
    count: int | None,
    samples: int | None,
    references: Sequence[str],
    seed: int,
    images: bool,
) -> Plan:
    from far_runtime.conditioning.subjects import resolve_subjects, takes_text
    from far_runtime.errors import FarError
    from far_runtime.progress import say

    if takes_text(opened.manifest):
        return _plan_of_prompts(opened, prompts, count, samples, references)
    if prompts is not None:
        raise FarError(f"{opened.path}: draws from class labels; leave out --prompts and give --reference")
    if samples is not None:
        raise FarError("--samples is for --prompts; use --count for classes")
    if not references:
        raise FarError("nothing to compare with; give --reference DIR, or statistics: --reference FILE.npz")
    classes, count = opened.manifest.model.classes, count or DEFAULT_COUNT
    _check_count(count, references)
    if count % classes:
        say(f"{count} pictures of {classes} classes: some classes have one more than others")
    files = [f"pictures/{seed + i:07d}.png" for i in range(count)] if images else None
    return Plan(resolve_subjects(opened.manifest, [i % classes for i in range(count)]), files, {})


def _plan_of_prompts(
    opened: Bundle, prompts: Path | None, count: int | None, samples: int | None, references: Sequence[str]
) -> Plan:
    from far_runtime.conditioning.prompt_files import read_prompts
    from far_runtime.conditioning.subjects import resolve_subjects
    from far_runtime.errors import FarError
    from far_runtime.progress import say

    if prompts is None:
        raise FarError(f"{opened.path}: draws from text; give it prompts: --prompts FILE")
    found = read_prompts(prompts, count, samples)
    _check_count(len(found.prompts), references)
    say(f"{prompts.name}: {found.kind}, {len(set(found.prompts))} different prompts, {len(found.names)} pictures")
    subjects = resolve_subjects(opened.manifest, prompts=found.prompts)
    return Plan(subjects, found.names, {"prompts": found.digest}, found.write_notes)


def _check_count(count: int, references: Sequence[str]) -> None:
    from far_runtime.errors import FarError

    if references and count < 2:
        raise FarError("1 picture: expected 2 or more to compare with a reference; use --count 1000, say")


def _network(weights: Path | None) -> Extractor:
    from far_export.evaluate import features as networks
    from far_export.evaluate.inception import inception
    from far_runtime.progress import say

    return inception(weights, say) if weights else networks.lite()


def _print(made: Figures, as_json: bool, lines: Sequence[str]) -> None:
    from rich.console import Console

    from far_export.evaluate.table import remarks, table

    if as_json:
        click.echo(json.dumps(made.to_dict()))
        return
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    console.print(table(made))
    for line in (*remarks(made), *lines):
        console.print(line, markup=False, soft_wrap=True)
