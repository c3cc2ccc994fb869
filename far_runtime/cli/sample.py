"""`far sample`: many pictures from a bundle into sharded files, on one machine or many."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engine
from far_runtime.cli.option_names import with_options
from far_runtime.cli.ray_options import parse_resources, ray_options, refuse_without_ray
from far_runtime.cli.sampling_options import sampling_options, subject_options, take_sampling
from far_runtime.images.metadata import MAX_BATCH

if TYPE_CHECKING:
    from far_runtime.bundle import Bundle
    from far_runtime.conditioning.subjects import Subject
    from far_runtime.engines.base import EngineOptions
    from far_runtime.sample.draw import DrawnShard
    from far_runtime.sample.folder import SampleFolder
    from far_runtime.sample.run import Shard

PATH = click.Path(path_type=Path)


@click.command(short_help="Draw many pictures into sharded files.")
@click.argument("bundle", type=PATH)
@click.option("--count", type=click.IntRange(min=1), required=True, help="How many pictures to draw.")
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Folder of the shards.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picture i has the seed SEED+i.")
@subject_options("all classes; the pictures show them in turn")
@click.option(
    "--prompts",
    "prompt_file",
    type=PATH,
    metavar="FILE",
    help="Prompts to draw in turn: a text file with one per line, GenEval's evaluation_metadata.jsonl, or COCO's "
    "captions_val2014.json.",
)
@click.option(
    "--format",
    "format",
    type=click.Choice(["webdataset", "parquet"]),
    default="webdataset",
    show_default=True,
    help="webdataset: tars of SEED.png and SEED.json (the settings). parquet: rows with the PNG file and the settings "
    "(needs pyarrow).",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1, 100_000),
    default=256,
    show_default=True,
    help="Pictures of a shard. After a kill, unfinished shards are drawn again.",
)
@click.option(
    "--batch-size", type=click.IntRange(1, MAX_BATCH), default=8, show_default=True, help="Pictures drawn at once."
)
@sampling_options
@engine_options(f"{BEST}; with --ray, on each worker's machine")
@click.option("--ray", "on_ray", is_flag=True, help="Draw with workers on Ray, on one machine or many.")
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="Workers, each with its own engine."
)
@ray_options("worker")
@click.option(
    "--mixed", is_flag=True, help="Let engines differ between shards; pictures are then the same up to rounding only."
)
@click.option("--no-check", is_flag=True, help="Do not compare the bundle with its checksums first.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no report.")
@click.pass_context
def sample(
    ctx: click.Context, /, bundle: Path, count: int, output: Path, seed: int, labels: tuple[str, ...],
    prompts: tuple[str, ...], negative: str, prompt_file: Path | None, format: str, shard_size: int, batch_size: int,
    on_ray: bool, workers: int, cpus: float, gpus: float, resources: tuple[str, ...], address: str | None, mixed: bool,
    no_check: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Draw many pictures from BUNDLE into DIR, as shards of a data set.

    A shard appears whole or not at all. The same command continues a run that was stopped. Every seed is drawn once,
    and its picture is the same with one process or with many workers."""
    from far_runtime import __version__
    from far_runtime.bundle import open_bundle
    from far_runtime.machine.ray_cluster import WorkerResources
    from far_runtime.progress import progress, say, silent
    from far_runtime.sample.folder import SampleFolder
    from far_runtime.sample.on_ray import WorkerConfig, draw_on_ray
    from far_runtime.sample.run import SampleRun
    from far_runtime.sample.shards import check_format
    from far_runtime.sampling.settings import check_system, resolve_settings

    started = time.perf_counter()
    if not on_ray:
        refuse_without_ray(ctx, "workers")
    worker_resources = WorkerResources(cpus, gpus, parse_resources(resources))
    check_format(format)
    opened = open_bundle(bundle, check=not no_check)
    check_system(opened)
    engine, engine_settings = take_engine(options)
    run = SampleRun(
        subjects=_subjects(opened, labels, prompts, negative, prompt_file, count),
        settings=resolve_settings(opened.manifest, take_sampling(options)),
        count=count,
        seed=seed,
        batch_size=batch_size,
        shard_size=shard_size,
        format=format,
        mixed=mixed,
    )
    folder = SampleFolder(output, run)
    with folder.locked(run.facts(opened.manifest.id, __version__)):
        shards, damaged = folder.missing()
        for name in damaged:
            say(f"warning: {output / name}: is damaged, and drawn again")
        done = count - sum(shard.count for shard in shards)
        title = f"pictures (going on: {done} are there)" if done else "pictures"
        with (silent if quiet else progress)(title, count) as report:
            if on_ray:
                config = WorkerConfig(
                    run=run,
                    bundle=bundle.resolve(),
                    bundle_id=opened.manifest.id,
                    engine=engine,
                    options=engine_settings,
                    check=not no_check,
                    expected_engine=folder.engine,
                )
                drawn = draw_on_ray(config, shards, workers, worker_resources, address)
            else:
                drawn = _draw_here(folder, opened, shards, engine, engine_settings, done, report)
            with closing(drawn):
                engines = _write_shards(folder, drawn, done, report)
    if quiet:
        return
    seconds, new = time.perf_counter() - started, count - done
    click.echo(f"{output}: {count} pictures in {len(run.shards)} shards, seeds {seed} to {seed + count - 1}")
    if new:
        by = f", by {min(workers, len(shards))} workers" if on_ray else ""
        click.echo(f"drew {new} in {seconds:.1f} s, {new / seconds:.2f} a second{by}, on {', '.join(sorted(engines))}")


def _write_shards(
    folder: SampleFolder, drawn: Iterable[DrawnShard], done: int, report: Callable[[int], None]
) -> set[str]:
    """Write shards as they are drawn, and print each warning once; returns names and versions of their engines.

    done: how many pictures the folder has already.
    """
    from far_runtime.progress import say

    warnings: set[str] = set()
    engines: set[str] = set()
    for shard in drawn:
        folder.write(shard)
        done += shard.shard.count
        report(done)
        engines.add(f"{shard.engine['engine']} {shard.engine['engine_version']}")
        for warning in shard.warnings:
            if warning not in warnings:
                warnings.add(warning)
                say(f"warning: {with_options(warning)}")
    return engines


def _draw_here(
    folder: SampleFolder,
    opened: Bundle,
    shards: Sequence[Shard],
    name: str | None,
    options: EngineOptions,
    done: int,
    report: Callable[[int], None],
) -> Generator[DrawnShard, None, None]:
    """Draw shards one after the other in this process; done: how many pictures the folder has already."""
    from far_runtime.pipeline import Pipeline
    from far_runtime.progress import say
    from far_runtime.sample.draw import draw_shard, engine_facts

    if not shards:
        return
    choice, lines = resolve_engine(name, opened)
    for line in lines:
        say(line)

    def on_batch(count: int) -> None:
        report(done + count)

    with Pipeline.over(opened, choice, options) as pipeline:
        folder.check_engine(engine_facts(pipeline))
        for shard in shards:
            yield draw_shard(pipeline, folder.run, shard, on_batch)
            done += shard.count


def _subjects(
    opened: Bundle, labels: Sequence[str], prompts: Sequence[str], negative: str, file: Path | None, count: int
) -> list[Subject]:
    """What the pictures show in turn; all classes if nothing is asked for."""
    from far_runtime.conditioning.prompt_files import read_prompts
    from far_runtime.conditioning.subjects import resolve_subjects, takes_text
    from far_runtime.errors import FarError
    from far_runtime.progress import say

    manifest = opened.manifest
    if file is not None:
        if prompts or labels:
            raise FarError("--prompts excludes --prompt and --label; give one of them")
        prompts = read_prompts(file, count, 1).prompts
    subjects = resolve_subjects(manifest, labels, prompts, negative)
    if not subjects:
        if takes_text(manifest):
            raise FarError(f"{opened.path}: draws from text; say what: --prompt TEXT, or --prompts FILE")
        subjects = resolve_subjects(manifest, range(manifest.model.classes))
    noun = "prompts" if takes_text(manifest) else "classes"
    if count < len(subjects):
        say(f"{count} pictures of {len(subjects)} {noun}: the first {count} of them alone")
    elif count % len(subjects):
        say(f"{count} pictures of {len(subjects)} {noun}: some have one more than others")
    return subjects
