"""`far sample`: many pictures from a bundle into sharded files, on one machine or many."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engine
from far_runtime.cli.ray_options import parse_resources, ray_options, refuse_without_ray
from far_runtime.cli.sampling_options import sampling_options, subject_options, take_sampling
from far_runtime.images.metadata import MAX_BATCH

if TYPE_CHECKING:
    from far_runtime.bundle import Bundle
    from far_runtime.conditioning.subjects import Subject
    from far_runtime.engines.base import EngineOptions
    from far_runtime.sample.draw import Made
    from far_runtime.sample.folder import Folder
    from far_runtime.sample.plan import Shard

PATH = click.Path(path_type=Path)


@click.command(short_help="Draw many pictures into sharded files.")
@click.argument("bundle", type=PATH)
@click.option("--count", type=click.IntRange(min=1), required=True, help="Pictures in all.")
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Folder of the shards.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picture i has the seed SEED+i.")
@subject_options("all classes in turn; of several, picture i shows the one at i modulo their number")
@click.option(
    "--prompts",
    "prompt_file",
    type=PATH,
    metavar="FILE",
    help="Prompts in turn: a text file with one a line, GenEval's evaluation_metadata.jsonl, COCO's "
    "captions_val2014.json.",
)
@click.option(
    "--format",
    "format",
    type=click.Choice(["webdataset", "parquet"]),
    default="webdataset",
    show_default=True,
    help="Tars of SEED.png and SEED.json (the settings), or parquet with the PNG files in it (needs pyarrow).",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1, 100_000),
    default=256,
    show_default=True,
    help="Pictures of a shard, which is what is drawn anew after a kill.",
)
@click.option(
    "--batch-size", type=click.IntRange(1, MAX_BATCH), default=8, show_default=True, help="Pictures computed together."
)
@sampling_options
@engine_options(f"{BEST}; with --ray, on each worker's machine")
@click.option("--ray", "on_ray", is_flag=True, help="Draw with workers on Ray, which may be on many machines.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Each with an engine of its own.")
@ray_options("worker")
@click.option("--mixed", is_flag=True, help="Let shards' engines differ: the same pictures only up to rounding.")
@click.option("--no-check", is_flag=True, help="Do not compare the bundle with its checksums first.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no report.")
@click.pass_context
def sample(
    ctx: click.Context, /, bundle: Path, count: int, output: Path, seed: int, labels: tuple[str, ...],
    prompts: tuple[str, ...], negative: str, prompt_file: Path | None, format: str, shard_size: int, batch_size: int,
    on_ray: bool, workers: int, cpus: float, gpus: float, resources: tuple[str, ...], address: str | None, mixed: bool,
    no_check: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Draw many pictures from BUNDLE into DIR, as shards of a data set. Each shard is there whole or not at all, and
    a run that was ended goes on where it was when it is started again: every seed is drawn once, and its picture is the
    same with one process or many workers."""
    import time
    from contextlib import closing

    from far_runtime import __version__
    from far_runtime.bundle import open_bundle
    from far_runtime.machine.ray_cluster import WorkerResources
    from far_runtime.progress import progress, say, silent
    from far_runtime.sample.folder import Folder
    from far_runtime.sample.on_ray import WorkerConfig, drawn_on_ray
    from far_runtime.sample.plan import Plan
    from far_runtime.sample.shards import check_format
    from far_runtime.sampling.settings import check_system, resolve_settings

    started = time.perf_counter()
    if not on_ray:
        refuse_without_ray(ctx, "workers")
    each = WorkerResources(cpus, gpus, parse_resources(resources))
    check_format(format)
    opened = open_bundle(bundle, check=not no_check)
    check_system(opened)
    subjects = _subjects(opened, labels, prompts, negative, prompt_file, count)
    settings = resolve_settings(opened.manifest, take_sampling(options))
    engine, engine_settings = take_engine(options)
    plan = Plan(subjects, settings, count, seed, batch_size, shard_size, format, mixed)
    folder = Folder(output, plan)
    with folder.opened(plan.facts(opened.manifest.id, __version__)):
        shards, damaged = folder.missing()
        for name in damaged:
            say(f"warning: {output / name}: is damaged, and drawn again")
        before = count - sum(shard.count for shard in shards)
        title = f"pictures (going on: {before} are there)" if before else "pictures"
        told: set[str] = set()
        engines: set[str] = set()
        with (silent if quiet else progress)(title, count) as report:

            def within(done: int) -> None:
                report(before + done)

            if on_ray:
                here = bundle.resolve()
                setting = WorkerConfig(
                    plan, here, opened.manifest.id, engine, engine_settings, not no_check, folder.engine
                )
                drawn = drawn_on_ray(setting, shards, workers, each, address)
            else:
                drawn = _drawn_here(folder, opened, shards, engine, engine_settings, within)
            with closing(drawn):
                for made in drawn:
                    folder.write(made)
                    before += made.shard.count
                    report(before)
                    engines.add(f"{made.engine['engine']} {made.engine['engine_version']}")
                    for warning in made.warnings:
                        if warning not in told:
                            told.add(warning)
                            say(f"warning: {warning}")
    if quiet:
        return
    seconds, new = time.perf_counter() - started, sum(shard.count for shard in shards)
    click.echo(f"{output}: {count} pictures in {len(plan.shards)} shards, seeds {seed} to {seed + count - 1}")
    if new:
        by = f", by {min(workers, len(shards))} workers" if on_ray else ""
        click.echo(f"drew {new} in {seconds:.1f} s, {new / seconds:.2f} a second{by}, on {', '.join(sorted(engines))}")


def _drawn_here(
    folder: Folder, opened: Bundle, shards: Sequence[Shard], name: str | None, options: EngineOptions,
    within: Callable[[int], None],
) -> Generator[Made, None, None]:  # fmt: skip
    """The shards one after the other, in this process. within: told how many pictures of a shard there are."""
    from far_runtime.pipeline import Pipeline
    from far_runtime.progress import say
    from far_runtime.sample.draw import draw_shard, engine_of

    if not shards:
        return
    engine, why = resolve_engine(name, opened)
    for line in why:
        say(line)
    with Pipeline.over(opened, engine, options) as pipeline:
        folder.check_engine(engine_of(pipeline))
        for shard in shards:
            yield draw_shard(pipeline, folder.plan, shard, within)


def _subjects(
    opened: Bundle, labels: Sequence[str], prompts: Sequence[str], negative: str, file: Path | None, count: int
) -> list[Subject]:
    """What is drawn in turn."""
    from far_runtime.conditioning.prompt_files import read_prompts
    from far_runtime.conditioning.subjects import resolve_subjects, takes_text
    from far_runtime.errors import FarError
    from far_runtime.progress import say

    manifest = opened.manifest
    if file is not None:
        if prompts or labels:
            raise FarError("--prompts and --prompt or --label: give one of them")
        prompts = read_prompts(file, count, 1).prompts
    subjects = resolve_subjects(manifest, labels, prompts, negative)
    if not subjects:
        if takes_text(manifest):
            raise FarError(f"{opened.path}: draws from text; say what: --prompt TEXT, or --prompts FILE")
        subjects = resolve_subjects(manifest, range(manifest.model["classes"]))
    kind = "prompts" if takes_text(manifest) else "classes"
    if count < len(subjects):
        say(f"{count} pictures of {len(subjects)} {kind}: the first {count} of these alone")
    elif count % len(subjects):
        say(f"{count} pictures of {len(subjects)} {kind}: some have one more than others")
    return subjects
