"""The speed ledger: seconds of a picture by the released code and by far-deploy, at the official sizes, in one run.

    python scripts/bench_ledger.py [--quick] [--system far-b ...] [--json FILE] [--plot FILE.png] [--keep DIR]

Checkpoints of the official sizes with random weights are exported and drawn from through the ordinary Pipeline. With
--keep DIR that is done once, and a later run uses the same files. The released loop (scripts/bench/released.py) would
take minutes per picture; its calls are timed one by one and multiplied by their number. --whole also runs one whole
level of it, to show that this holds. VAR's released loop is run whole.

Both sides run in interleaved rounds, each in its own process; times are medians over the rounds. The floor is the time
of the arithmetic alone at the rate of the machine's matrix products. Presets are those of bundles that were not tuned,
since random weights cannot be tuned.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from bench.ledger_measurement import SYSTEMS, LedgerOptions, matmul_rates, measure
from bench.ledger_plot import save_plot
from bench.ledger_report import report, table
from far_runtime.plotting import check_plot

PRECISIONS = ("int8",)


@click.command(help=__doc__)
@click.option("--system", "systems", multiple=True, type=click.Choice(list(SYSTEMS)), help="Default: all.")
@click.option("--precision", "precisions", multiple=True, help="Precision of the bundles. Default: int8.")
@click.option("--quick", is_flag=True, help="One round, one picture at a time, without torch.compile.")
@click.option("--whole", is_flag=True, help="Also time one whole level of FAR's released loop.")
@click.option("--rounds", type=click.IntRange(min=1), help="Number of rounds. Default: 3; with --quick 1.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all results as JSON.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Write a bar chart (PNG or SVG).")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for checkpoints and bundles, kept afterwards.")
def main(
    systems: tuple[str, ...],
    precisions: tuple[str, ...],
    quick: bool,
    whole: bool,
    rounds: int | None,
    json_file: Path | None,
    plot_file: Path | None,
    keep: Path | None,
) -> None:
    if plot_file is not None:
        check_plot(plot_file)
    rounds = rounds or (1 if quick else 3)
    with tempfile.TemporaryDirectory() as aside:
        options = LedgerOptions(
            folder=keep or Path(aside), precisions=precisions or PRECISIONS, rounds=rounds, quick=quick, whole=whole
        )
        rates = matmul_rates(rounds)
        result = {}
        for system in systems or SYSTEMS:
            result[system] = best = report(measure(system, options), rates)
            click.echo(
                f"{system}: {best['seconds_reference']:.1f} s released in fp32, {best['seconds']:.2f} s ours "
                f"({best['preset']}, {best['engine']}): {best['ratio']:.1f} times as fast", err=True,
            )  # fmt: skip
            # Written after every system, so that an interrupted run keeps what it has measured.
            if json_file is not None:
                json_file.write_text(json.dumps({**result, "rates": rates}, indent=1) + "\n")
        click.echo(table(result, rates))
    if plot_file is not None:
        save_plot(result, plot_file)


if __name__ == "__main__":
    main()
