"""`far bench`: engines compared on one machine.

Libraries are imported where they are used, so that --help and wrong options are answered at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engines
from far_runtime.cli.option_names import option
from far_runtime.cli.sampling_options import sampling_options, subject_options, take_sampling
from far_runtime.images.metadata import MAX_BATCH

if TYPE_CHECKING:
    from far_runtime.bench.engine_specs import EngineSpec
    from far_runtime.bench.results import BenchmarkResult
    from far_runtime.bench.runner import OnProgress
    from far_runtime.bundle import Bundle
    from far_runtime.conditioning.subjects import Subject
    from far_runtime.engines.base import EngineOptions

FILE = click.Path(path_type=Path)
DEFAULT_ROUNDS = 10
LABELS = 8


class BatchSizes(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Batch sizes with commas between them, as a tuple."""

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


@dataclass(frozen=True)
class BenchFiles:
    """The files that the command writes."""

    json: Path | None
    """All results as JSON; "-" is standard output, None writes none."""

    plot: Path | None
    """The plot, PNG or SVG; None writes none."""

    @property
    def json_to_stdout(self) -> bool:
        """Whether the JSON goes to standard output, so that everything else goes to standard error."""
        return str(self.json) == "-"

    @property
    def by_option(self) -> list[tuple[str, Path]]:
        """Option and path of every file."""
        json_file = None if self.json_to_stdout else self.json
        return [(name, path) for name, path in (("--json", json_file), ("--plot", self.plot)) if path is not None]

    def check(self, inputs: dict[str, Path | None]) -> None:
        """FarError where a file cannot be written, or would replace another or one of the inputs (by option)."""
        from far_runtime.plotting import check_plot
        from far_runtime.storage.atomic import check_distinct, check_file

        if self.plot is not None:
            check_plot(self.plot)
        check_distinct(self.by_option, {name: path for name, path in inputs.items() if path is not None})
        for name, path in self.by_option:
            check_file(path, name)

    def write_json(self, text: str) -> None:
        """Write the results to the file or to standard output."""
        from far_runtime.storage.atomic import whole_file

        if self.json_to_stdout:
            click.echo(text, nl=False)
        elif self.json is not None:
            with whole_file(self.json) as aside:
                aside.write_text(text, encoding="utf-8")


@click.command(short_help="Compare engines: time, memory and arithmetic.")
@click.argument("bundle", type=FILE)
@engine_options(BEST, several=True)
@click.option("--batch", "batches", type=BatchSizes(), default="1,4", show_default=True, help="Batch sizes to measure.")
@click.option("--repeat", type=click.IntRange(min=1), help=f"Number of rounds. Default: {DEFAULT_ROUNDS}.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Time within which rounds begin, in seconds; instead of --repeat.",
)
@subject_options(f"the first {LABELS} classes in turn")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of a batch's first picture; the next ones have SEED+1, SEED+2, ...",
)
@sampling_options
@click.option("--checkpoint", type=FILE, help="Checkpoint of the bundle, for torch and torch:compile.")
@click.option(
    "--vae", type=FILE, help="VAE of the checkpoint. Default: the file beside it with the name in the bundle."
)
@click.option("--text-encoder", type=FILE, metavar="DIR", help="Text encoder of the checkpoint, if it has one.")
@click.option(
    "--json", "json_file", type=FILE, metavar="FILE|-", help="Write all results as JSON; - is standard output."
)
@click.option("--plot", "plot_file", type=FILE, metavar="FILE", help="Write a plot as PNG or SVG (needs matplotlib).")
@click.option("--no-check", is_flag=True, help="Do not compare the bundle with its checksums first.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no tables.")
def bench(**options: Any) -> None:
    """Generate the same pictures from BUNDLE on several engines and compare them.

    Measures the time of a batch and of every stage, pictures per second, load time, memory, and arithmetic per second
    beside what a plain matrix product reaches on this machine. Every engine runs in its own process; in every round
    one engine runs after the other.
    """
    from rich.console import Console

    from far_runtime.bench.engine_specs import engine_specs
    from far_runtime.bench.table import print_result
    from far_runtime.errors import CheckFailed, join_texts
    from far_runtime.progress import progress_bar

    if options["repeat"] is not None and options["seconds"] is not None:
        raise click.UsageError("--repeat and --seconds: give one or the other", click.get_current_context())
    files, quiet = BenchFiles(options["json_file"], options["plot_file"]), options["quiet"]
    files.check({"--checkpoint": options["checkpoint"], "--vae": options["vae"]})
    names, engine_options = take_engines(options)
    specs = engine_specs(names)
    with progress_bar(not quiet and sys.stderr.isatty(), elapsed=True) as on_progress:
        result, context = _run(specs, engine_options, options, on_progress)
    if not quiet:
        width = None if sys.stdout.isatty() and not files.json_to_stdout else 120
        console = Console(stderr=files.json_to_stdout, highlight=False, width=width)
        print_result(result, context["machine"], console, option)
    files.write_json(json.dumps(result.to_dict(**context), indent=1) + "\n")
    if not result.baseline:
        raise CheckFailed(join_texts(result.failures, "; "))
    if files.plot is not None:
        _plot(result, context, files.plot)
    if files.by_option and not quiet:
        click.echo("written: " + ", ".join(str(path) for _, path in files.by_option), err=files.json_to_stdout)
    if result.failures:
        raise CheckFailed(join_texts(result.failures, "; "))


def _run(
    specs: list[EngineSpec], engine_options: EngineOptions, options: dict[str, Any], on_progress: OnProgress | None
) -> tuple[BenchmarkResult, dict[str, Any]]:
    """Run the benchmark; its results, and the bundle, settings and machine that they belong to."""
    from functools import partial

    from far_runtime.bench import matmul_rate
    from far_runtime.bench.engine_benchmark import EngineBenchmark
    from far_runtime.bench.engine_specs import CheckpointFiles, engine_plugins, engine_specs
    from far_runtime.bench.results import summarize
    from far_runtime.bench.runner import RunLimit, run_benchmark
    from far_runtime.bundle import open_bundle
    from far_runtime.conditioning.subjects import default_subjects, resolve_subjects
    from far_runtime.sampling.flops import picture_cost
    from far_runtime.sampling.settings import check_system, resolve_plan

    bundle = open_bundle(options["bundle"], check=not options["no_check"])
    check_system(bundle)
    manifest = bundle.manifest
    settings, plan = resolve_plan(manifest, take_sampling(options))
    subjects = resolve_subjects(manifest, options["labels"], options["prompts"], options["negative"])
    subjects = subjects or default_subjects(manifest, LABELS)
    if not specs:
        choice, lines = resolve_engine(None, bundle)
        specs = engine_specs([choice.name])
        if not options["quiet"]:
            click.echo("\n".join(lines), err=True)
    files = CheckpointFiles(**{n: options[n] and options[n].resolve() for n in ("checkpoint", "vae", "text_encoder")})
    benchmarks = [
        EngineBenchmark(
            bundle=bundle.path,
            engine=spec,
            options=engine_options,
            files=files,
            subjects=tuple(subjects),
            seed=options["seed"],
            sampling=settings,
        )
        for spec in specs
    ]
    matmul = partial(
        matmul_rate.MatmulRate, plugins=engine_plugins(), threads=engine_options.threads, size=matmul_rate.SIZE
    )
    limit = RunLimit(options["repeat"] or DEFAULT_ROUNDS, options["seconds"])
    runs = run_benchmark(benchmarks, manifest.precision, options["batches"], limit, matmul, on_progress)
    result = summarize(runs, picture_cost(manifest, plan))
    context = _context(bundle, settings, subjects, engine_options, options)
    if any(engine.device == "gpu" for engine in result.engines):
        from far_runtime.machine.gpu import gpu_memory

        context["machine"]["gpu"] = gpu_memory()
    return result, context


def _context(
    bundle: Bundle,
    settings: dict[str, Any],
    subjects: list[Subject],
    engine_options: EngineOptions,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What the results belong to, as it stands in the JSON."""
    from far_runtime import __version__
    from far_runtime.machine.report import machine_facts

    manifest = bundle.manifest
    return {
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
        "options": asdict(engine_options),
        "batches": list(options["batches"]),
        "machine": machine_facts(),
    }


def _plot(result: BenchmarkResult, context: dict[str, Any], path: Path) -> None:
    """Write the plot; FarError where nothing was measured."""
    from far_runtime.bench.plot import save_plot
    from far_runtime.errors import FarError

    machine = f"{context['machine']['processor']}, {context['machine']['usable_processors']} processors"
    try:
        save_plot(result, f"{context['bundle']['name']} on {machine}", path)
    except ValueError as error:
        raise FarError(f"--plot: {error}, so there is nothing to draw; ask for a smaller --batch") from error
