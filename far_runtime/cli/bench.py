"""`far bench`: engines against each other on one machine. Libraries are imported where they are used, so that help and
wrong options answer at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engines
from far_runtime.cli.option_names import option
from far_runtime.cli.sampling_options import sampling_options, subject_options, take_sampling
from far_runtime.images.metadata import MAX_BATCH

if TYPE_CHECKING:
    from far_runtime.bench.rounds import OnProgress
    from far_runtime.bundle import Bundle

FILE = click.Path(path_type=Path)
DEFAULT_ROUNDS = 10
LABELS = 8


class BatchSizes(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Whole numbers with commas between them."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}: expected numbers with commas between them, such as 1,4,8", param, ctx)
        if not all(1 <= size <= MAX_BATCH for size in sizes):
            self.fail(f"{value!r}: batch sizes are 1 to {MAX_BATCH}", param, ctx)
        if len(set(sizes)) != len(sizes):
            self.fail(f"{value!r}: give each batch size once", param, ctx)
        return sizes


@click.command(short_help="Compare engines: time, memory and arithmetic.")
@click.argument("bundle", type=FILE)
@engine_options(BEST, several=True)
@click.option("--batch", "batches", type=BatchSizes(), default="1,4", show_default=True, help="Batch sizes.")
@click.option("--repeat", type=click.IntRange(min=1), help=f"Rounds. Default: {DEFAULT_ROUNDS}.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Begin rounds for so long, in place of --repeat.",
)
@subject_options(f"the first {LABELS} classes in turn")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first picture of a batch.")
@sampling_options
@click.option("--checkpoint", type=FILE, help="For torch and torch:compile: the checkpoint of the bundle.")
@click.option("--vae", type=FILE, help="Its VAE. Default: the file of the recorded name beside the checkpoint.")
@click.option("--text-encoder", type=FILE, metavar="DIR", help="Its text encoder, if any.")
@click.option("--json", "json_file", type=FILE, metavar="FILE|-", help="Write all figures; - is standard output.")
@click.option("--plot", "plot_file", type=FILE, metavar="FILE", help="Draw them as a PNG or SVG (needs matplotlib).")
@click.option("--no-check", is_flag=True, help="Do not compare the bundle with its checksums first.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar and no tables.")
def bench(**options: Any) -> None:
    """Draw the same pictures from BUNDLE on several engines, in turn, round after round, and compare: time of a batch
    and of every stage, pictures a second, load time, memory, and arithmetic a second beside what the machine's plain
    matrix product reaches. Every engine runs in a process of its own."""
    from rich.console import Console

    from far_runtime.bench.contenders import contenders
    from far_runtime.bench.plot import save_plot
    from far_runtime.bench.table import print_figures
    from far_runtime.errors import CheckFailed, FarError, join_texts
    from far_runtime.plotting import check_plot
    from far_runtime.progress import progress_bar
    from far_runtime.storage.atomic import check_distinct, check_file, whole_file

    json_file, plot_file = options["json_file"], options["plot_file"]
    to_stdout = json_file is not None and str(json_file) == "-"
    written = [(name, path) for name, path in (("--json", json_file), ("--plot", plot_file)) if path is not None]
    written = written[1:] if to_stdout else written
    if options["repeat"] is not None and options["seconds"] is not None:
        raise click.UsageError("--repeat and --seconds: give one or the other", click.get_current_context())
    if plot_file is not None:
        check_plot(plot_file)
    read = {"--checkpoint": options["checkpoint"], "--vae": options["vae"]}
    check_distinct(written, {name: path for name, path in read.items() if path is not None})
    for name, path in written:
        check_file(path, name)
    names, engine_settings = take_engines(options)
    compared = contenders(names)
    with progress_bar(not options["quiet"] and sys.stderr.isatty(), elapsed=True) as on_progress:
        figures, facts = run(compared, engine_settings, options, on_progress)
    if not options["quiet"]:
        wide = None if sys.stdout.isatty() and not to_stdout else 120
        print_figures(figures, facts["machine"], Console(stderr=to_stdout, highlight=False, width=wide), option)
    text = json.dumps(figures.to_dict(**facts), indent=1) + "\n"
    if to_stdout:
        click.echo(text, nl=False)
    elif json_file is not None:
        with whole_file(json_file) as aside:
            aside.write_text(text, encoding="utf-8")
    if not figures.first:
        raise CheckFailed(join_texts(figures.failures, "; "))
    if plot_file is not None:
        try:
            machine = f"{facts['machine']['processor']}, {facts['machine']['usable_processors']} processors"
            save_plot(figures, f"{facts['bundle']['name']} on {machine}", plot_file)
        except ValueError as error:
            raise FarError(f"--plot: {error}, so there is nothing to draw; ask for a smaller --batch") from error
    if written and not options["quiet"]:
        click.echo("written: " + ", ".join(str(path) for _, path in written), err=to_stdout)
    if figures.failures:
        raise CheckFailed(join_texts(figures.failures, "; "))


def run(
    compared: Any, engine_settings: Any, options: dict[str, Any], on_progress: OnProgress | None
) -> tuple[Any, Any]:
    """The figures, and what they are of: bundle, settings and machine."""
    from dataclasses import asdict
    from functools import partial

    from far_runtime import __version__
    from far_runtime.bench import matmul_rate as products
    from far_runtime.bench.contenders import GPU, Sources, contenders, plugins
    from far_runtime.bench.rounds import Length, measure
    from far_runtime.bench.session import EngineSession
    from far_runtime.bench.statistics import figures_of
    from far_runtime.bundle import open_bundle
    from far_runtime.conditioning.subjects import default_subjects, resolve_subjects
    from far_runtime.machine.gpu import gpu_memory
    from far_runtime.machine.report import machine_facts
    from far_runtime.sampling.flops import picture_cost
    from far_runtime.sampling.settings import check_system, resolve_plan

    bundle: Bundle = open_bundle(options["bundle"], check=not options["no_check"])
    check_system(bundle)
    manifest = bundle.manifest
    settings, plan = resolve_plan(manifest, take_sampling(options))
    subjects = resolve_subjects(manifest, options["labels"], options["prompts"], options["negative"])
    subjects = subjects or default_subjects(manifest, LABELS)
    if not compared:
        name, lines = resolve_engine(None, bundle)
        compared = contenders([name])
        if not options["quiet"]:
            click.echo("\n".join(lines), err=True)
    sources = Sources(
        *(path and path.resolve() for path in (options[n] for n in ("checkpoint", "vae", "text_encoder")))
    )
    sessions = [
        EngineSession(bundle.path, contender, engine_settings, sources, tuple(subjects), options["seed"], settings)
        for contender in compared
    ]
    multiply = partial(products.MatmulRate, plugins=plugins(), threads=engine_settings.threads, size=products.SIZE)
    length = Length(options["repeat"] or DEFAULT_ROUNDS, options["seconds"])
    runs = measure(sessions, manifest.precision, options["batches"], length, multiply, on_progress)
    figures = figures_of(runs, picture_cost(manifest, plan))
    machine = machine_facts()
    if any(engine.device == GPU for engine in figures.engines):
        machine["gpu"] = gpu_memory()
    facts = {
        "far_deploy": __version__,
        "bundle": {
            "name": bundle.path.resolve().name,
            "id": manifest.id,
            "system": manifest.system,
            "precision": manifest.precision,
        },
        "settings": settings,
        "subjects": [subject.caption for subject in subjects],
        "seed": options["seed"],
        "options": asdict(engine_settings),
        "batches": list(options["batches"]),
        "machine": machine,
    }
    return figures, facts
