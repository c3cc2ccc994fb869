"""`far verify`: compare a bundle with the checkpoint that it was exported from."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.cli.engine_options import BEST, engine_options, resolve_engine, take_engine
from far_runtime.cli.sampling_options import sampling_options, subject_options, take_sampling

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from far_export.verify.parity import SampleInputs
    from far_export.verify.results import Report
    from far_runtime.bundle import Bundle

FILE = click.Path(path_type=Path)
DEFAULT_SUBJECTS = 2


@click.command(short_help="Compare a bundle with its checkpoint, stage by stage (needs torch).")
@click.argument("bundle", type=FILE)
@click.option("--checkpoint", type=FILE, required=True, help="The checkpoint that the bundle was exported from.")
@click.option(
    "--vae", type=FILE, help="The VAE of the export. Default: the file of that name in the checkpoint's folder."
)
@click.option(
    "--weights",
    type=click.Choice(["model_ema", "model"]),
    help="The weights to use of a .pth. Default: those that were exported.",
)
@click.option(
    "--text-encoder", type=FILE, metavar="DIR", help="Folder of the text encoder of the export, if there was one."
)
@click.option(
    "--config",
    multiple=True,
    metavar="NAME=VALUE|FILE",
    help="Settings that the weights do not state. Default: those of the export.",
)
@engine_options(BEST)
@subject_options("the first two classes")
@click.option(
    "--count", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures of each class or prompt."
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the first picture of each class or prompt; the next ones have SEED+1, ...",
)
@sampling_options
@click.option(
    "--tolerance-scale",
    type=click.FloatRange(min=0, max=1e6, min_open=True),
    default=1.0,
    show_default=True,
    metavar="FACTOR",
    help="Multiply all tolerances by this. They are the manifest's, or the exporter's where these are smaller.",
)
@click.option(
    "--distribution",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=256,
    metavar="[N]",
    help="Also compare the distributions of N pictures (default: 256) of BUNDLE and of the checkpoint. They fail where "
    "their distance is more than 1.5 times the distance of two sets of the checkpoint's.",
)
@click.option(
    "--json", "json_file", type=FILE, metavar="FILE|-", help="Write all figures as JSON; - stands for standard output."
)
@click.option(
    "--html",
    "html_file",
    type=FILE,
    metavar="FILE",
    help="Write a page with all figures and the pictures side by side.",
)
def verify(**options: Any) -> None:
    """Draw the same pictures with BUNDLE and with its checkpoint, from the same noise, and compare every stage at every
    step. The exit code is 1 where an error is beyond its tolerance."""  # fmt: skip
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
    report, reasons = _run(options)
    console = Console(stderr=to_stdout, highlight=False)
    print_report(report, console)
    for line in reasons:
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
        raise CheckFailed(report.first_failure)


def _run(options: dict[str, Any]) -> tuple[Report, list[str]]:
    """The report, and lines on the choice of the engine where none was named."""
    from far_export.load import check_weights, load_pair
    from far_export.verify.distribution import check_distribution, check_possible
    from far_export.verify.parity import VerifyOptions, verify_bundle
    from far_export.verify.reference import recorded_vae, reference_stages, reference_text
    from far_models.checkpoint.load import parse_overrides
    from far_runtime.bundle import open_bundle
    from far_runtime.progress import progress_bar
    from far_runtime.sampling.settings import check_system

    bundle = open_bundle(options["bundle"])
    check_system(bundle)
    manifest = bundle.manifest
    inputs = _inputs(bundle, options)
    engine, engine_settings = take_engine(options)
    choice, reasons = resolve_engine(engine, bundle)
    checkpoint = options["checkpoint"]
    vae = options["vae"] or recorded_vae(manifest, checkpoint)
    # None: the usual weights.
    weights = options["weights"] or manifest.source.get("checkpoint", {}).get("weights") or None
    overrides = manifest.source.get("config", {}) | parse_overrides(options["config"])
    model, decoder = load_pair(checkpoint, vae, weights, overrides, manifest.system)
    # The recorded name does not have to be there: a file with a single set of weights will do.
    check_weights(model, options["weights"])
    text = reference_text(manifest, model, options["text_encoder"])
    count: int | None = options["distribution"]
    if count is not None:
        check_possible(count)
    with _torch_threads(engine_settings.threads), progress_bar(sys.stderr.isatty(), "diffusion steps") as on_progress:
        report = verify_bundle(
            bundle, model.model, decoder.model, choice, inputs, text=text, engine_options=engine_settings,
            options=VerifyOptions(tolerance_scale=options["tolerance_scale"], on_progress=on_progress),
        )  # fmt: skip
    if count is not None:
        stages = reference_stages(manifest, model.model, decoder.model, text)
        with _torch_threads(engine_settings.threads):
            distribution = check_distribution(
                bundle, stages, choice, inputs.settings, count, options=engine_settings, seed=options["seed"],
                report=lambda line: click.echo(line, err=True),
            )  # fmt: skip
        report = replace(report, distribution=distribution)
    return report, reasons


def _inputs(bundle: Bundle, options: dict[str, Any]) -> SampleInputs:
    """What to draw: every subject `--count` times, with rising seeds."""
    from far_export.verify.parity import SampleInputs
    from far_runtime.conditioning.subjects import default_subjects, resolve_subjects
    from far_runtime.sampling.settings import resolve_settings

    manifest, count = bundle.manifest, options["count"]
    settings = resolve_settings(manifest, take_sampling(options))
    subjects = resolve_subjects(manifest, options["labels"], options["prompts"], options["negative"])
    subjects = subjects or default_subjects(manifest, DEFAULT_SUBJECTS)
    seeds = [options["seed"] + i for i in range(count)]
    return SampleInputs([subject for subject in subjects for _ in seeds], seeds * len(subjects), settings)


@contextlib.contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use this many threads inside the block; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def print_report(report: Report, console: Console) -> None:
    """Print the table, what failed, and a line with the result."""
    from far_export.verify.rows import psnr_text, result_line, unchecked_ranges

    console.print(f"{report.candidate.text} against {report.reference.text}", markup=False)
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
    for sentence in unchecked_ranges(report):
        console.print(sentence, style="yellow", markup=False, soft_wrap=True)
    style = "bold green" if report.passed else "bold red"
    console.print(result_line(report), style=style, markup=False, soft_wrap=True)


def table(report: Report) -> Table:
    """Stages by step, each step followed by the latents of the free run."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from far_export.verify.rows import table_rows

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("step")
    table.add_column("stage", no_wrap=True)
    for heading in ("calls", "error", "limit", "1-cos", "max abs", "NaN/Inf"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for rows in table_rows(report):
        for row in rows:
            table.add_row(
                row.step if row is rows[0] else "", row.stage, row.calls, row.error, row.limit, row.cosine_distance,
                row.max_abs, row.nonfinite, Text("ok", "green") if row.passed else Text("FAIL", "bold red"),
                end_section=row.step == report.loop[-1].step_name and row is rows[-1],
            )  # fmt: skip
    return table
