"""`far tune`: the cheapest schedules of a bundle that keep the distribution of its pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engine

if TYPE_CHECKING:
    from rich.table import Table

    from far_export.tune.run import Tuned

FILE = click.Path(path_type=Path)


@click.command(short_help="Find the cheapest schedules that keep the pictures' distribution (needs torch).")
@click.argument("bundle", type=FILE)
@engine_options(BEST)
@click.option("--count", type=click.IntRange(min=1), default=256, show_default=True, help="Pictures of each set.")
@click.option("--seed", type=int, default=0, show_default=True, help="First seed of the first set.")
@click.option("--evaluations", type=click.IntRange(min=1), metavar="N", help="Stop after so many candidates.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Stop after so many minutes.")
@click.option(
    "--journal",
    type=FILE,
    help="Notes of what was judged, from which a later run goes on. Default: in the user's cache.",
)
@click.option("--dry-run", is_flag=True, help="Leave the bundle as it is.")
@click.option("--save", type=FILE, metavar="FILE", help="Also write the presets to a file, for far export --presets.")
@click.option("--plot", type=FILE, metavar="FILE.png", help="Draw arithmetic against distance.")
@click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write all candidates as JSON.")
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
    """Find schedules for BUNDLE whose pictures keep the distribution of the official schedule's, as cheap as can be:
    the presets quality, balanced and fast of far generate --preset. Solvers, diffusion steps of every level, levels and
    guided halves are tried; the distance of a candidate is that of its images' features (efficientnet-lite0) and of
    its latents' frequencies, in units of the distance of two official sets. A run that is ended goes on from its
    journal."""
    from rich.console import Console

    from far_export.evaluate.feature_cache import FeatureCache
    from far_export.tune import presets as written
    from far_export.tune import run
    from far_export.tune.distance import Judge
    from far_export.tune.journal import Journal
    from far_export.verify.distribution import check_possible
    from far_runtime import __version__
    from far_runtime.bench.plot import check_plot
    from far_runtime.bundle import open_bundle
    from far_runtime.pipeline import Pipeline
    from far_runtime.sampling.settings import check_system, resolve_settings
    from far_runtime.storage.atomic import check_distinct, check_file, user_cache

    outputs = [(option, path) for option, path in (("--save", save), ("--plot", plot), ("--json", json_file)) if path]
    for option, path in outputs:
        check_file(path, option)
    check_distinct(outputs)
    if plot is not None:
        check_plot(plot)
    opened = open_bundle(bundle)
    check_system(opened)
    if not dry_run:
        written.check_writable(opened)
    run.space_of(opened.manifest)
    network = check_possible(count, "--count")
    name, engine_settings = take_engine(options)
    name, why = resolve_engine(name, opened)
    with Pipeline.over(opened, name, engine_settings) as pipeline:
        surroundings = pipeline.surroundings()
        facts = {
            "bundle": opened.manifest.id, "engine": surroundings["engine"], "version": __version__, "count": count,
            "engine_version": surroundings["engine_version"], "seed": seed, "features": "efficientnet-lite0 + dct",
            "official": resolve_settings(opened.manifest, {"preset": "official"}),
        }  # fmt: skip
        folder = user_cache() / "tune"
        notes = Journal(journal or folder / f"{opened.manifest.id}.jsonl", facts)
        if len(notes):
            click.echo(f"going on with {len(notes)} candidates of an earlier run", err=True)

        def report(line: str) -> None:
            click.echo(line, err=True)

        judge = Judge(pipeline, network, count, seed, FeatureCache(folder, facts), report)
        seconds = None if minutes is None else 60 * minutes
        found = run.tune(opened.manifest, judge, notes, run.Budget(evaluations, seconds), report)
    how = {"engine": facts["engine"], "count": count, "seed": seed, "version": __version__}
    presets = written.presets_of(found, how)
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    console.print(table(found))
    for line in _summary(found, presets):
        console.print(line, markup=False, soft_wrap=True)
    for line in why:
        console.print(line, markup=False, soft_wrap=True)
    if save is not None:
        written.save_presets(save, presets)
    if plot is not None:
        from far_export.tune.plot import save_plot

        save_plot(found, f"{bundle.name}: schedules on {facts['engine']}, {count} pictures a set", plot)
    if json_file is not None:
        _write_json(found, presets, json_file)
    if not dry_run and presets:
        written.write_presets(opened, presets)
        click.echo(
            f"{bundle}: now has the presets {', '.join(presets)}; far generate {bundle} --preset {next(iter(presets))}"
        )


def _summary(found: Tuned, presets: dict[str, Any]) -> list[str]:
    from far_runtime.sampling.presets import LIMITS

    lines = [
        f"preset {name}: no schedule within {limit:g} was found, so it stays as it was"
        for name, limit in LIMITS.items()
        if name not in presets
    ]
    if not found.complete:
        lines.append("the search was ended by its budget; run it again to go on")
    return lines


def table(found: Tuned) -> Table:
    """The candidates that no other beats, and those chosen."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from far_export.tune.run import short
    from far_export.tune.search import front

    again = {id(one.judged): f"{one.again.ratio:.3f}" for one in found.chosen.values()}
    names: dict[int, list[str]] = {}
    for name, preset in found.chosen.items():
        names.setdefault(id(preset.judged), []).append(name)
    made = Table(
        title=f"{len(found.judged)} candidates; those that none beats, and the chosen", box=SIMPLE_HEAD,
        title_justify="left", pad_edge=False,
    )  # fmt: skip
    for column in ("solver", "levels", "steps", "start", "floor"):
        made.add_column(column)
    for column in ("GFLOP", "of official", "s/picture", "images", "latents", "other seeds"):
        made.add_column(column, justify="right")
    made.add_column("preset")
    shown = {id(one): one for one in [*front(found.judged), *(one.judged for one in found.chosen.values())]}
    for key, one in sorted(shown.items(), key=lambda item: item[1].flops):
        settings = one.settings
        start = settings.get("start")
        made.add_row(
            settings["solver"], ",".join(map(str, settings.get("levels", []))), short(settings["steps"]),
            "" if start is None else str(start), f"{settings['guidance_floor']:g}", f"{one.flops / 1e9:.3g}",
            f"1/{found.official_flops / one.flops:.1f}", f"{one.seconds:.3f}", f"{one.image:.3f}", f"{one.latents:.3f}",
            again.get(key, ""), ", ".join(names.get(key, [])),
        )  # fmt: skip
    return made


def _write_json(found: Tuned, presets: dict[str, Any], path: Path) -> None:
    from dataclasses import asdict

    from far_runtime.storage.atomic import whole_file

    content = {
        "complete": found.complete, "official_flops": found.official_flops, "presets": presets,
        "candidates": [{**asdict(one), "ratio": one.ratio} for one in found.judged.values()],
    }  # fmt: skip
    with whole_file(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
