"""`far evaluate`: metrics of a bundle's pictures, or the pictures of a benchmark's prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engine
from far_runtime.cli.option_names import with_options
from far_runtime.cli.sampling_options import sampling_options, take_sampling
from far_runtime.images.metadata import MAX_BATCH

if TYPE_CHECKING:
    from far_export.evaluate.evaluation import Evaluation
    from far_export.evaluate.features import ExtractedFeatures, FeatureExtractor
    from far_export.evaluate.floor import Floor
    from far_export.evaluate.reference import Reference
    from far_runtime.bundle import Bundle, Manifest
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
    help="Folder of pictures to compare with, or a file of their statistics (adm_in256_stats.npz); may be repeated. "
    "PART is train, held_out or all, for a folder with split.json.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    help=f"Number of pictures to draw, every class equally often; with --prompts, number of prompts. Default: "
    f"{DEFAULT_COUNT} pictures, all prompts (30,000 of COCO).",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picture i has the seed SEED + i."
)
@click.option(
    "--prompts",
    type=PATH,
    metavar="FILE",
    help="File of prompts: GenEval's evaluation_metadata.jsonl, COCO's captions_val2014.json, or a text file with one "
    "prompt on each line. The pictures stand in the folders that the benchmark's scorer reads.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Pictures of each prompt. Default: 1, or 4 for GenEval.")
@click.option(
    "--inception",
    type=PATH,
    metavar="FILE",
    help="Inception weights, for FID: inception-2015-12-05.pt (TorchScript, which is a program: take it from a source "
    "that you trust), or pt_inception-2015-12-05-6726825d.pth where torch-fidelity is installed. Default: "
    "efficientnet-lite0, whose features give no FID.",
)
@click.option(
    "--floor",
    type=PATH,
    metavar="VAE",
    help="VAE checkpoint: also measure its reconstructions of the references' pictures (rFID), the best that the model "
    "can reach.",
)
@click.option(
    "--images",
    is_flag=True,
    help="Keep the pictures, in the folder pictures of the output, and not only their features. With --prompts they "
    "are always kept.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=Path("evaluation"),
    show_default=True,
    help="Folder of the metrics and of what was drawn, from which a run that was stopped goes on.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, MAX_BATCH),
    default=8,
    show_default=True,
    help="Number of pictures that are drawn together.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
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
    """Draw pictures from BUNDLE and compare them with references: Frechet distance (FID), inception score, precision
    and recall.

    A run that was stopped goes on where it was when it is started again."""
    from far_export.evaluate.table import remarks
    from far_runtime.bundle import open_bundle
    from far_runtime.errors import FarError
    from far_runtime.progress import say
    from far_runtime.sampling.settings import check_system, resolve_settings
    from far_runtime.storage.atomic import check_folder, whole_file

    for option, value in (("--floor", floor), ("--inception", inception)):
        if value and not references:
            raise FarError(f"{option} is for comparisons; give --reference too, or leave it out")
    opened = open_bundle(bundle)
    check_system(opened)
    task = _task(opened, prompts, count, samples, references, seed, images)
    check_folder(output)
    sampling = take_sampling(options)
    resolve_settings(opened.manifest, sampling)
    comparison = _comparison(opened.manifest, references, inception, floor) if references else None
    drawn, facts, choice = _draw(opened, task, comparison, output, batch_size, sampling, options)
    if drawn is None or comparison is None:
        say(f"{output}: {len(task.subjects)} pictures")
        return
    evaluation = _evaluate(drawn, comparison, facts)
    with whole_file(output / "evaluate.json") as aside:
        aside.write_text(json.dumps(evaluation.to_dict(), indent=1) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(evaluation.to_dict()))
    else:
        _print(evaluation, [*remarks(evaluation), *choice, f"figures: {output / 'evaluate.json'}"])


@dataclass(frozen=True)
class Task:
    """The pictures to draw."""

    subjects: Sequence[Subject]
    """A class or a prompt for every picture."""

    seed: int
    """Picture i has the seed `seed` + i."""

    files: Sequence[str] | None
    """The pictures' files, relative to the output folder; None where pictures are not kept."""

    facts: Mapping[str, Any]
    """What tells this task from another one, for the run's record."""

    write_notes: Callable[[Path], None] = lambda folder: None
    """Writes what else a benchmark's scorer reads into the output folder."""


@dataclass(frozen=True)
class Comparison:
    """What the drawn pictures are compared with, and by which features."""

    network: FeatureExtractor
    """The network whose features are compared."""

    references: Sequence[Reference]
    """What --reference named, in that order."""

    floor: Floor | None
    """The VAE whose reconstructions are measured too."""


def _task(
    bundle: Bundle,
    prompts: Path | None,
    count: int | None,
    samples: int | None,
    references: Sequence[str],
    seed: int,
    images: bool,
) -> Task:
    from far_runtime.conditioning.subjects import resolve_subjects, takes_text
    from far_runtime.errors import FarError
    from far_runtime.progress import say

    if takes_text(bundle.manifest):
        return _prompts_task(bundle, prompts, count, samples, references, seed)
    if prompts is not None:
        raise FarError(f"{bundle.path}: draws from class labels; leave out --prompts and give --reference")
    if samples is not None:
        raise FarError("--samples is for --prompts; use --count for classes")
    if not references:
        raise FarError("nothing to compare with; give --reference DIR, or statistics: --reference FILE.npz")
    classes, count = bundle.manifest.model.classes, count or DEFAULT_COUNT
    _check_count(count, references)
    if count % classes:
        say(f"{count} pictures of {classes} classes: some classes have one more than others")
    files = [f"pictures/{seed + i:07d}.png" for i in range(count)] if images else None
    return Task(resolve_subjects(bundle.manifest, [i % classes for i in range(count)]), seed, files, {})


def _prompts_task(
    bundle: Bundle, prompts: Path | None, count: int | None, samples: int | None, references: Sequence[str], seed: int
) -> Task:
    from far_runtime.conditioning.prompt_files import read_prompts
    from far_runtime.conditioning.subjects import resolve_subjects
    from far_runtime.errors import FarError
    from far_runtime.progress import say

    if prompts is None:
        raise FarError(f"{bundle.path}: draws from text; give it prompts: --prompts FILE")
    file = read_prompts(prompts, count, samples)
    _check_count(len(file.prompts), references)
    say(f"{prompts.name}: {file.kind}, {len(set(file.prompts))} different prompts, {len(file.names)} pictures")
    return Task(
        subjects=resolve_subjects(bundle.manifest, prompts=file.prompts),
        seed=seed,
        files=file.names,
        facts={"prompts": file.digest},
        write_notes=file.write_notes,
    )


def _check_count(count: int, references: Sequence[str]) -> None:
    from far_runtime.errors import FarError

    if references and count < 2:
        raise FarError("1 picture: expected 2 or more to compare with a reference; use --count 1000, say")


def _comparison(
    manifest: Manifest, references: Sequence[str], inception: Path | None, floor: Path | None
) -> Comparison:
    from far_export.evaluate import features
    from far_export.evaluate.floor import open_floor
    from far_export.evaluate.inception import inception as open_inception
    from far_export.evaluate.reference import open_reference
    from far_export.stages import SYSTEMS
    from far_runtime.progress import progress, say

    vae = open_floor(floor, SYSTEMS[manifest.system].vae) if floor else None
    network = open_inception(inception, say) if inception else features.efficientnet_lite0()
    size = manifest.model.image_size
    return Comparison(network, [open_reference(text, size, network, progress) for text in references], vae)


def _draw(
    bundle: Bundle,
    task: Task,
    comparison: Comparison | None,
    output: Path,
    batch_size: int,
    sampling: Mapping[str, Any],
    options: dict[str, Any],
) -> tuple[ExtractedFeatures | None, dict[str, Any], list[str]]:
    """The features of the drawn pictures (None without a comparison), what the pictures depend on, and lines on the
    choice of the engine."""
    from far_export.evaluate.run import Run
    from far_runtime import __version__
    from far_runtime.pipeline import Pipeline
    from far_runtime.progress import progress, say
    from far_runtime.sampling.settings import resolve_settings

    name, engine_settings = take_engine(options)
    engine, choice = resolve_engine(name, bundle)
    with Pipeline.over(bundle, engine, engine_settings) as pipeline:
        facts = {
            "bundle": bundle.manifest.id, "engine": pipeline.engine.name,
            "engine_version": pipeline.surroundings()["engine_version"], "version": __version__, "seed": task.seed,
            "settings": resolve_settings(bundle.manifest, sampling), **task.facts,
        }  # fmt: skip
        run = Run(
            folder=output,
            facts=facts,
            count=len(task.subjects),
            batch=batch_size,
            files=[output / file for file in task.files] if task.files else None,
            network=comparison.network if comparison else None,
        )
        run.begin()
        task.write_notes(output)
        reported: set[str] = set()

        def draw(numbers: range) -> Any:
            subjects = task.subjects[numbers.start : numbers.stop]
            generation = pipeline.generate(
                subjects, [task.seed + i for i in numbers], batch_size=batch_size, **sampling
            )
            for warning in generation.warnings:
                if warning not in reported:
                    reported.add(warning)
                    say(f"warning: {with_options(warning)}")
            return generation.images

        return run.complete(draw, progress), facts, choice


def _evaluate(drawn: ExtractedFeatures, comparison: Comparison, facts: Mapping[str, Any]) -> Evaluation:
    import numpy
    import torch

    from far_export.evaluate.evaluation import calculate_metrics
    from far_runtime.progress import progress

    network, floor = comparison.network, comparison.floor
    floors = [floor.features(ref, network, progress) if floor else None for ref in comparison.references]
    versions = {"torch": torch.__version__, "numpy": numpy.__version__}
    run = {**facts, **versions, "network": network.digest, "floor": floor.digest if floor else None}
    return calculate_metrics(drawn, comparison.references, network, floors, run)


def _print(evaluation: Evaluation, lines: Sequence[str]) -> None:
    from rich.console import Console

    from far_export.evaluate.table import table

    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    console.print(table(evaluation))
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
