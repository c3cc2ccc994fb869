"""Time and memory of whole processes, from their start to a picture on the disk, in interleaved rounds.

    python scripts/bench/start.py BUNDLE [--engine openvino ...] [--runs 5] [--sampling "--levels 0,2 --steps 2"]

Every engine draws one picture with `far generate`, without and with --low-memory. The imports stand beside it, less the
time of Python itself. Prints the medians of seconds and of peak resident memory (anonymous and mapped pages), and the
peak divided by the size of the bundle's weights.
"""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from far_runtime.bundle import WEIGHTS

FAR = "from far_runtime.cli.main import main; main()"


def run(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak resident memory in bytes of a Python process; SystemExit where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{shlex.join(arguments)}: failed")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--engine",
    "engines",
    multiple=True,
    default=("openvino", "onnxruntime"),
    show_default=True,
    help="Engine; may be repeated.",
)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of every process.")
@click.option("--sampling", default="", help="Options of far generate, such as '--steps 2' for large models.")
def main(bundle: Path, engines: tuple[str, ...], runs: int, sampling: str) -> None:
    weights = (bundle / WEIGHTS).stat().st_size
    with tempfile.TemporaryDirectory() as aside:
        output = str(Path(aside) / "out.png")
        commands = {"python": ["-c", "pass"]}
        commands |= {f"import {name}": ["-c", f"import {name}"] for name in ("far_runtime", "far_runtime.pipeline")}
        for engine in engines:
            command = ["-c", FAR, "generate", str(bundle), "--label", "3", "--engine", engine, "-q", "-o", output]
            commands[f"one picture, {engine}"] = [*command, *shlex.split(sampling)]
            commands[f"one picture, {engine}, --low-memory"] = [*command, *shlex.split(sampling), "--low-memory"]
        runs_of: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        # The first round warms the system's caches.
        for done in range(runs + 1):
            for name, arguments in commands.items():
                measured = run(arguments)
                runs_of[name] += [measured] if done else []
    bare = statistics.median(seconds for seconds, _ in runs_of["python"])
    click.echo(
        f"weights {weights / 1e6:.0f} MB\n\n| | seconds | peak MB | of the weights |\n| --- | ---: | ---: | ---: |"
    )
    for name, measurements in runs_of.items():
        seconds = statistics.median(seconds for seconds, _ in measurements)
        peak = statistics.median(peak for _, peak in measurements)
        shown = seconds - bare if name.startswith("import") else seconds
        of = f"{peak / weights:.2f}" if name.startswith("one") else ""
        click.echo(f"| {name} | {shown:.3f} | {peak / 1e6:.0f} | {of} |")


if __name__ == "__main__":
    main()
