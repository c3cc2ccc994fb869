"""`far verify`: a bundle against the checkpoint that it was exported from."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engine
from far_runtime.cli.sampling_options import sampling_options, subject_options, take_sampling

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from far_export.stages.stage import Stage
    from far_export.verify.parity import OnProgress
    from far_export.verify.results import Report
    from far_models.checkpoint.load import Checkpoint
    from far_runtime.bundle import Manifest

FILE = click.Path(path_type=Path)
DEFAULT_SUBJECTS = 2


@click.command(short_help="Compare a bundle with its checkpoint, stage by stage (needs torch).")
@click.argument("bundle", type=FILE)
@click.option("--checkpoint", type=FILE, required=True, help="The checkpoint that the bundle was exported from.")
@click.option("--vae", type=FILE, help="Its VAE. Default: the file of the recorded name beside the checkpoint.")
@click.option(
    "--weights", type=click.Choice(["model_ema", "model"]), help="Which weights of a .pth. Default: those exported."
)
@click.option(
    "--text-encoder", type=FILE, metavar="DIR", help="The text encoder that the bundle was exported with, if any."
)
@click.option(
    "--config",
    multiple=True,
    metavar="NAME=VALUE|FILE",
    help="Settings that the weights do not show. Those of the export are remembered.",
)
@engine_options(BEST)
@subject_options("the first two classes")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures of each subject.")
@click.option("--seed", type=int, default=0, show_default=True, help="Each subject's pictures have SEED, SEED+1, ...")
@sampling_options
@click.option(
    "--tolerance-scale",
    type=click.FloatRange(min=0, max=1e6, min_open=True),
    default=1.0,
    show_default=True,
    metavar="FACTOR",
    help="Multiplies the tolerances (the manifest's, or the exporter's where smaller).",
)
@click.option(
    "--distribution",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=256,
    metavar="[N]",
    help="Also compare the distributions of N pictures (256) of BUNDLE and of the checkpoint; exit with 1 where their "
    "distance is above 1.5 times that of two sets of the checkpoint's.",
)
@click.option(
    "--json", "json_file", type=FILE, metavar="FILE|-", help="Write all figures as JSON; - is standard output."
)
@click.option("--html", "html_file", type=FILE, metavar="FILE", help="Write a page with the pictures side by side.")
def verify(**options: Any) -> None:
    """Draw the same pictures from BUNDLE and from its checkpoint, with the same noise, and compare every stage at every
    level; exit with 1 where the difference is larger than the bundle's tolerances allow."""  # fmt: skip
    from rich.console import Console

    from far_export.verify.html import json_text, write_html, write_json
    from far_runtime.errors import CheckFailed
    from far_runtime.storage.atomic import check_distinct, check_file

    json_file, html_file = options["json_file"], options["html_file"]
    to_stdout = json_file is not None and str(json_file) == "-"
    if json_file is not None and not to_stdout:
        check_file(json_file, "--json")
    if html_file is not None:
        check_file(html_file, "--html")
    outputs = [("--html", html_file), ("--json", None if to_stdout else json_file)]
    inputs = {"--checkpoint": options["checkpoint"], "--vae": options["vae"]}
    check_distinct(
        [(option, path) for option, path in outputs if path is not None],
        {option: path for option, path in inputs.items() if path is not None},
    )
    report, why = _run(options)
    console = Console(stderr=to_stdout, highlight=False)
    print_report(report, console)
    for line in why:
        console.print(line, markup=False, soft_wrap=True)
    if to_stdout:
        click.echo(json_text(report), nl=False)
    elif json_file is not None:
        write_json(report, json_file)
    if html_file is not None:
        write_html(report, html_file)
    written = [str(path) for path in (None if to_stdout else json_file, html_file) if path is not None]
    if written:
        console.print("written: " + ", ".join(written), markup=False, soft_wrap=True)
    if not report.passed:
        others = len(report.failures) - 1
        raise CheckFailed(report.failures[0] + (f" (and {others} more)" if others else ""))


def _run(options: dict[str, Any]) -> tuple[Report, list[str]]:
    """The report, and a line on the engine if none was named."""
    from far_export.load import check_weights, load_pair
    from far_export.verify.distribution import check_distribution, check_possible
    from far_export.verify.parity import reference_stages, verify_bundle
    from far_models.checkpoint.load import parse_overrides
    from far_runtime.bundle import open_bundle
    from far_runtime.conditioning.subjects import default_subjects, resolve_subjects
    from far_runtime.sampling.settings import check_system, resolve_settings

    bundle = open_bundle(options["bundle"])
    check_system(bundle)
    manifest = bundle.manifest
    settings = resolve_settings(manifest, take_sampling(options))
    engine, engine_settings = take_engine(options)
    engine, why = resolve_engine(engine, bundle)
    chosen = resolve_subjects(manifest, options["labels"], options["prompts"], options["negative"])
    chosen = chosen or default_subjects(manifest, DEFAULT_SUBJECTS)
    subjects = [subject for subject in chosen for _ in range(options["count"])]
    seeds = [options["seed"] + i for _ in chosen for i in range(options["count"])]
    checkpoint = options["checkpoint"]
    vae = options["vae"] or recorded_vae(manifest, checkpoint)
    weights = options["weights"] or manifest.source.get("checkpoint", {}).get("weights") or None  # None: the usual ones
    overrides = manifest.source.get("config", {}) | parse_overrides(options["config"])
    model, decoder = load_pair(checkpoint, vae, weights, overrides, manifest.system)
    check_weights(model, options["weights"])  # what the bundle recorded is no demand: a single set will do
    text = reference_text(manifest, model, options["text_encoder"])
    many: int | None = options["distribution"]
    if many is not None:
        check_possible(many)
    with _threads(engine_settings.threads), progress_bar(sys.stderr.isatty()) as on_progress:
        report = verify_bundle(
            bundle, model.model, decoder.model, engine, subjects, seeds, settings, text=text,
            tolerance_scale=options["tolerance_scale"], options=engine_settings, on_progress=on_progress,
        )  # fmt: skip
    if many is not None:
        stages = [*reference_stages(manifest, model.model, decoder.model), *([] if text is None else [text])]
        with _threads(engine_settings.threads):
            found = check_distribution(
                bundle, stages, engine, settings, many, options=engine_settings, seed=options["seed"],
                report=lambda line: click.echo(line, err=True),
            )  # fmt: skip
        report = replace(report, distribution=found)
    return report, why


def reference_text(manifest: Manifest, model: Checkpoint, folder: Path | None) -> Stage | None:
    """The torch stage of the bundle's text encoder, where it has one; FarError where its folder is not given, or is
    another one's."""
    from far_export.load import text_part
    from far_runtime.errors import FarError

    if folder is None and any(graph.stage == "text" for graph in manifest.graphs):
        name = manifest.source.get("text_encoder", {}).get("folder", "DIR")
        raise FarError(f"the bundle has a text encoder; give the folder that it came from: --text-encoder {name}")
    part = text_part(model, manifest.model, folder)
    if part is None:
        return None
    if dict(part.settings) != manifest.model.get("text"):
        raise FarError(f"{folder}: not the text encoder that the bundle was exported with; its tokens are others")
    return part.stage


def recorded_vae(manifest: Manifest, checkpoint: Path) -> Path:
    """The VAE of the name that the bundle recorded, in the checkpoint's folder; FarError where there is none."""
    from far_runtime.errors import FarError

    name = manifest.source.get("vae", {}).get("file")
    if not name:
        raise FarError("the bundle does not say which VAE it was exported with; give it with --vae")
    path = checkpoint.parent / Path(name).name
    if not path.is_file():
        raise FarError(f"{path}: no such file; give the VAE that the bundle was exported with: --vae {Path(name).name}")
    return path


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Give torch that many threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def progress_bar(show: bool) -> Iterator[OnProgress | None]:
    """A bar over the loop's units (diffusion steps) of both runs on standard error."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("diffusion steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verify")
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_report(report: Report, console: Console) -> None:
    """The table, what failed, and a line that sums it up."""
    from far_export.verify.html import engine_text, number, psnr_text
    from far_export.verify.results import limit_text, psnr_limit_text, unseen

    console.print(f"{engine_text(report.candidate)} against {engine_text(report.reference)}", markup=False)
    console.print(table(report))
    for picture in report.pictures:
        console.print(
            f"picture of {picture.caption}, seed {picture.seed}: PSNR {psnr_text(picture.psnr)}, "
            f"largest difference {picture.max_difference} of 255",
            style="" if picture.passed else "red",
            markup=False,
        )
    if report.distribution is not None:
        style = "" if report.distribution.passed else "red"
        console.print(report.distribution.sentence, style=style, markup=False, soft_wrap=True)
    for sentence in unseen(report):
        console.print(sentence, style="yellow", markup=False, soft_wrap=True)
    worst = max(report.stages, key=lambda result: result.share)
    count = len(report.pictures)
    console.print(
        f"{'passed' if report.passed else 'FAILED'}: worst stage error {number(worst.error)} ({worst.stage}, limit "
        f"{worst.tolerance:.0e}), final latents {number(report.latents_error)} "
        f"(limit {limit_text(report.latents_limit, '.0e')}), "
        f"{count} picture{'s' if count != 1 else ''}, worst PSNR {psnr_text(report.worst_psnr)} "
        f"(limit {psnr_limit_text(report.pictures[0].limit)})",
        style="bold green" if report.passed else "bold red",
        markup=False,
        soft_wrap=True,
    )


def table(report: Report) -> Table:
    """Stages by step, each step followed by the latents of the free run."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from far_export.verify.html import number
    from far_export.verify.results import limit_text

    def verdict(passed: bool) -> Text:
        return Text("ok", "green") if passed else Text("FAIL", "bold red")

    rows = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    rows.add_column("step")
    rows.add_column("stage", no_wrap=True)
    for heading in ("calls", "error", "limit", "1-cos", "max abs", "NaN/Inf"):
        rows.add_column(heading, justify="right", no_wrap=True)
    rows.add_column("", no_wrap=True)
    for step, results in groupby(report.stages, key=lambda result: result.step):
        for i, result in enumerate(results):
            rows.add_row(
                "" if i else result.at, result.stage, str(result.calls), number(result.error),
                f"{result.tolerance:.0e}", number(1 - result.cosine), number(result.max_abs),
                str(result.nonfinite + result.nonfinite_reference), verdict(result.passed),
            )  # fmt: skip
        if step is not None:
            loop = report.loop[step]
            rows.add_row(
                "", "latents", "", number(loop.error), limit_text(loop.limit, ".0e"), number(1 - loop.cosine),
                number(loop.max_abs), str(loop.nonfinite + loop.nonfinite_reference), verdict(loop.passed),
                end_section=step == len(report.loop) - 1,
            )  # fmt: skip
    return rows
