"""Pictures per second of `far sample` in one process and with workers on Ray, in interleaved rounds.

    python scripts/bench/scale.py BUNDLE --workers 1,2 --count 96 --preset fast

Rates are taken between the first finished shard and the last, which leaves out the start of Ray and of the engines. The
seconds of the whole run stand beside them. Prints a JSON line per run, with the machine's load before it. All runs have
to write the same files, or the script fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

COMMAND = [sys.executable, "-c", "import sys; from far_runtime.cli.main import main; main(sys.argv[1:])", "sample"]


def run(arguments: list[str], folder: Path) -> dict[str, float]:
    """Seconds of one run, and pictures per second between its first shard and its last."""
    started = time.time()
    finished = subprocess.run([*COMMAND, *arguments, "-o", str(folder)], capture_output=True, text=True)
    if finished.returncode:
        raise click.ClickException(finished.stderr.strip().split("\n")[-1])
    seconds = time.time() - started
    size = json.loads((folder / "sample.json").read_text())["shard_size"]
    times = sorted(path.stat().st_mtime for path in folder.glob("shard-*"))
    return {"seconds": seconds, "rate": size * (len(times) - 1) / (times[-1] - times[0])}


def digest(folder: Path) -> str:
    """SHA-256 over all shards."""
    files = sorted(folder.glob("shard-*"))
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


@click.command(help=__doc__)
@click.argument("bundle")
@click.option("--workers", default="1,2", show_default=True, help="Numbers of workers, with commas between them.")
@click.option(
    "--count", type=int, default=96, show_default=True, help="Pictures of a run; a multiple of the shard size."
)
@click.option("--shard-size", type=int, default=8, show_default=True, help="Pictures of a shard.")
@click.option("--engine", default="onnxruntime", show_default=True, help="Engine that draws, with one thread.")
@click.option("--preset", default="fast", show_default=True, help="Sampling preset.")
@click.option("--repeat", type=int, default=1, show_default=True, help="Number of rounds.")
def main(bundle: str, workers: str, count: int, shard_size: int, engine: str, preset: str, repeat: int) -> None:
    fixed = [bundle, "--count", str(count), "--shard-size", str(shard_size), "--engine", engine, "--threads", "1"]
    fixed += ["--preset", preset]
    digests = set()
    for _ in range(repeat):
        first = 0.0
        for number in (0, *map(int, workers.split(","))):
            with tempfile.TemporaryDirectory() as name:
                load = os.getloadavg()[0]
                more = ["--ray", "--workers", str(number)] if number else []
                measured = run([*fixed, *more], Path(name) / "out")
                digests.add(digest(Path(name) / "out"))
            first = first or measured["rate"]
            line = {"workers": number or "no Ray", "pictures_per_second": round(measured["rate"], 2)}
            line |= {
                "ratio": round(measured["rate"] / first, 2),
                "seconds": round(measured["seconds"], 1),
                "load": load,
            }
            print(json.dumps(line), flush=True)
    if len(digests) != 1:
        raise click.ClickException("the runs differ in their files")


if __name__ == "__main__":
    main()
