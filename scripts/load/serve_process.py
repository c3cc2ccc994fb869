"""A `far serve` process for the scripts that test one, and the statistics that any server has at /metrics."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from prometheus_client.parser import text_string_to_metric_families

from far_runtime.errors import FarError

COMMAND = [sys.executable, "-c", "from far_runtime.cli.main import main; main()", "serve"]
START_SECONDS, STOP_SECONDS = 600.0, 90.0
"""Seconds that a server may take to start and to stop."""


@contextlib.contextmanager
def serving(bundle: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """The address of a server of this bundle on a free port of this machine; options: further ones of `far serve`.

    The terminal's Ctrl-C does not reach it. Its log is printed at the end. Raises FarError if it does not start, or
    does not exit with 0 after SIGTERM.
    """
    # The server has to stop when this process gets a SIGTERM.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryFile("w+") as log:
        command = [*COMMAND, str(bundle), "--port", "0", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        assert process.stdout is not None
        kill_timer = threading.Timer(START_SECONDS, process.kill)
        kill_timer.start()
        try:
            match = re.match(r"serving .* at (http://\S+) ", process.stdout.readline())
            kill_timer.cancel()
            if match is None:
                process.wait(STOP_SECONDS)
                raise FarError(f"far serve did not start: {_text(log) or 'it was killed'}")
            yield match[1]
            if process.poll() is not None:
                raise FarError(f"far serve exited by itself, with {process.returncode}: {_text(log)}")
        finally:
            kill_timer.cancel()
            exit_code = _stop(process)
            signal.signal(signal.SIGTERM, before)
        if text := _text(log):
            print(f"the server's log, {text.count(chr(10)) + 1} lines, begins:\n{text[:2000]}", file=sys.stderr)
        if exit_code:
            raise FarError(f"far serve exited with {exit_code} after SIGTERM, not 0")


def _stop(process: subprocess.Popen[str]) -> int:
    """The exit code of a process after SIGTERM."""
    process.terminate()
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _text(log: IO[str]) -> str:
    log.seek(0)
    return log.read().strip()


@dataclass(frozen=True)
class ServerStats:
    """The statistics of a server at one moment; 0 for what its system does not tell."""

    memory: float
    """Resident bytes of its process."""

    files: float
    """Open files of its process."""

    cpu: float
    """CPU seconds of its process."""

    pictures: float
    """Pictures drawn."""

    refused: Mapping[str, float]
    """Requests rejected, by reason."""

    batches: Mapping[int, float]
    """Batches by size, which is the upper bound of a histogram's bucket."""

    @classmethod
    def parse(cls, text: str) -> ServerStats:
        """From the text of /metrics."""
        totals: dict[str, float] = {}
        refused: dict[str, float] = {}
        cumulative: dict[float, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "far_rejections_total":
                    refused[sample.labels["reason"]] = sample.value
                elif sample.name == "far_batch_size_bucket":
                    size = float(sample.labels["le"])
                    cumulative[size] = cumulative.get(size, 0.0) + sample.value
                elif sample.name == "far_pictures_total" or not sample.labels:
                    totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        sizes = [0.0, *sorted(cumulative)]
        counts = {size: cumulative[size] - cumulative.get(smaller, 0.0) for smaller, size in pairwise(sizes)}
        return cls(
            memory=totals.get("process_resident_memory_bytes", 0.0),
            files=totals.get("process_open_fds", 0.0),
            cpu=totals.get("process_cpu_seconds_total", 0.0),
            pictures=totals.get("far_pictures_total", 0.0),
            refused=refused,
            batches={int(size): count for size, count in counts.items() if count and size != float("inf")},
        )
