"""`far tune`: the cheapest schedules of a bundle that keep the distribution of its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engine
from far_runtime.cli.option_names import with_options

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from far_export.tune.run import Budget, TuneResult
    from far_export.tune.search import Candidate
    from far_runtime.bundle import Bundle

FILE = click.Path(path_type=Path)


@click.command(short_help="Find the cheapest schedules that keep the pictures' distribution (needs torch).")
@click.argument("bundle", type=FILE)
@engine_options(BEST)
@click.option(
    "--count", type=click.IntRange(min=1), default=256, show_default=True, help="Number of pictures in each set."
)
@click.option("--seed", type=int, default=0, show_default=True, help="First seed of the first set.")
@click.option("--evaluations", type=click.IntRange(min=1), metavar="N", help="Stop after N schedules were tried.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Stop after so many minutes.")
@click.option(
    "--journal",
    type=FILE,
    help="File that keeps the result of every schedule, from which a later run goes on. Default: in the user's cache.",
)
@click.option("--dry-run", is_flag=True, help="Leave the bundle as it is.")
@click.option("--save", type=FILE, metavar="FILE", help="Also write the presets to a file, for far export --presets.")
@click.option("--plot", type=FILE, metavar="FILE.png", help="Plot FLOPs against distance as PNG or SVG.")
@click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write all schedules that were tried as JSON.")
def tune(
    bundle: Path,
    count: int,
    seed: int,
    evaluations: int | None,
    minutes: float | None,
    journal: Path | None,
    dry_run: bool,
    save: Path | None,
    plot: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Find the cheapest schedules for BUNDLE whose pictures keep the distribution of the official schedule's pictures.

    They become the presets quality, balanced and fast of far generate --preset. Solvers, diffusion steps of every
    level, the list of levels, and levels without guidance are tried. The distance of a schedule is the larger of two:
    that of its pictures' features (efficientnet-lite0), and that of its latents' frequencies. Its unit is the distance
    of two sets of pictures by the official schedule. A run that was stopped goes on from its journal."""
    from far_export.tune import presets as tuned_presets
    from far_export.tune.plot import save_plot
    from far_export.tune.run import Budget, space_of
    from far_export.verify.distribution import check_possible
    from far_runtime.bundle import open_bundle
    from far_runtime.plotting import check_plot
    from far_runtime.sampling.settings import check_system
    from far_runtime.storage.atomic import check_distinct, check_file

    outputs = [(option, path) for option, path in (("--save", save), ("--plot", plot), ("--json", json_file)) if path]
    for option, path in outputs:
        check_file(path, option)
    check_distinct(outputs)
    if plot is not None:
        check_plot(plot)
    opened = open_bundle(bundle)
    check_system(opened)
    if not dry_run:
        tuned_presets.check_writable(opened)
    space_of(opened.manifest)
    network = check_possible(count, "--count")
    budget = Budget(evaluations, None if minutes is None else 60 * minutes)
    result, record, engine_choice = _search(opened, options, network, count, seed, budget, journal)
    presets = tuned_presets.presets_of(result, record)
    _print(result, [*_remarks(result), *engine_choice])
    if save is not None:
        tuned_presets.save_presets(save, presets)
    if plot is not None:
        save_plot(result, f"{bundle.name}: schedules on {record['engine']}, {count} pictures a set", plot)
    if json_file is not None:
        _write_json(result, presets, json_file)
    if not dry_run and presets:
        tuned_presets.write_presets(opened, presets)
        click.echo(
            f"{bundle}: now has the presets {', '.join(presets)}; far generate {bundle} --preset {next(iter(presets))}"
        )


def _search(
    bundle: Bundle,
    options: dict[str, Any],
    network: nn.Module,
    count: int,
    seed: int,
    budget: Budget,
    journal: Path | None,
) -> tuple[TuneResult, dict[str, Any], list[str]]:
    """The search's result, how it was measured, and lines on the choice of the engine."""
    from far_export.evaluate.feature_cache import FeatureCache
    from far_export.tune.distance import Scorer
    from far_export.tune.journal import Journal
    from far_export.tune.run import tune
    from far_runtime import __version__
    from far_runtime.pipeline import Pipeline
    from far_runtime.progress import say
    from far_runtime.sampling.settings import resolve_settings
    from far_runtime.storage.atomic import user_cache

    name, engine_settings = take_engine(options)
    engine, choice = resolve_engine(name, bundle)
    with Pipeline.over(bundle, engine, engine_settings) as pipeline:
        surroundings = pipeline.surroundings()
        facts = {
            "bundle": bundle.manifest.id, "engine": surroundings["engine"], "version": __version__, "count": count,
            "engine_version": surroundings["engine_version"], "seed": seed, "features": "efficientnet-lite0 + dct",
            "official": resolve_settings(bundle.manifest, {"preset": "official"}),
        }  # fmt: skip
        folder = user_cache() / "tune"
        scores = Journal(journal or folder / f"{bundle.manifest.id}.jsonl", facts)
        if len(scores):
            say(f"going on with {len(scores)} candidates of an earlier run")
        scorer = Scorer(
            pipeline, network, count, seed, FeatureCache(folder, facts), lambda line: say(with_options(line))
        )
        result = tune(bundle.manifest, scorer, scores, budget, say)
    return result, {name: facts[name] for name in ("engine", "count", "seed", "version")}, choice


def _remarks(result: TuneResult) -> list[str]:
    from far_runtime.sampling.presets import LIMITS

    lines = [
        f"preset {name}: no schedule within {limit:g} was found, so it stays as it was"
        for name, limit in LIMITS.items()
        if name not in result.chosen
    ]
    if not result.complete:
        lines.append("the search was ended by its budget; run it again to go on")
    return lines


def _print(result: TuneResult, lines: list[str]) -> None:
    from rich.console import Console

    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    console.print(table(result))
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def table(result: TuneResult) -> Table:
    """The candidates of the Pareto front, and those chosen, the cheapest first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from far_export.tune.search import front

    chosen: dict[int, list[str]] = {}
    for name, preset in result.chosen.items():
        chosen.setdefault(id(preset.candidate), []).append(name)
    title = f"{len(result.candidates)} candidates; those that none beats, and the chosen"
    rows = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in ("solver", "levels", "steps", "start", "floor"):
        rows.add_column(column)
    for column in ("GFLOP", "of official", "s/picture", "images", "latents", "other seeds"):
        rows.add_column(column, justify="right")
    rows.add_column("preset")
    shown = [*front(result.candidates), *(preset.candidate for preset in result.chosen.values())]
    for candidate in sorted({id(c): c for c in shown}.values(), key=lambda c: c.flops):
        rows.add_row(*_row(candidate, result, chosen.get(id(candidate), [])))
    return rows


def _row(candidate: Candidate, result: TuneResult, names: list[str]) -> list[str]:
    """names: presets that the candidate was chosen for."""
    from far_export.tune.run import steps_text

    settings = candidate.settings
    start = settings.get("start")
    return [
        settings["solver"],
        ",".join(map(str, settings.get("levels", []))),
        steps_text(settings["steps"]),
        "" if start is None else str(start),
        f"{settings['guidance_floor']:g}",
        f"{candidate.flops / 1e9:.3g}",
        f"1/{result.official_flops / candidate.flops:.1f}",
        f"{candidate.seconds:.3f}",
        f"{candidate.image:.3f}",
        f"{candidate.latents:.3f}",
        f"{result.chosen[names[0]].confirmation.ratio:.3f}" if names else "",
        ", ".join(names),
    ]


def _write_json(result: TuneResult, presets: dict[str, Any], path: Path) -> None:
    from dataclasses import asdict

    from far_runtime.storage.atomic import whole_file

    content = {
        "complete": result.complete, "official_flops": result.official_flops, "presets": presets,
        "candidates": [{**asdict(candidate), "ratio": candidate.ratio} for candidate in result.candidates.values()],
    }  # fmt: skip
    with whole_file(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
