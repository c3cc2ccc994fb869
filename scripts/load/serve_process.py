"""A `far serve` of one's own for the scripts that press it, and what any server says of itself at /metrics."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from far_runtime.errors import FarError

COMMAND = [sys.executable, "-c", "from far_runtime.cli.main import main; main()", "serve"]
STARTS, ENDS = 600.0, 90.0
"""Seconds that a server may take to load and to end."""


@contextlib.contextmanager
def serving(bundle: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """The address of a server of this bundle at a free port of this machine; options: further ones of `far serve`.

    It does not hear the terminal's Ctrl-C. What it logs is shown at the end. FarError where it does not start, and
    where it does not end in good order at SIGTERM.
    """
    # So that it ends with its caller.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryFile("w+") as log:
        command = [*COMMAND, str(bundle), "--port", "0", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        assert process.stdout is not None
        late = threading.Timer(STARTS, process.kill)
        late.start()
        try:
            found = re.match(r"serving .* at (http://\S+) ", process.stdout.readline())
            late.cancel()
            if found is None:
                process.wait(ENDS)
                raise FarError(f"far serve did not start: {_logged(log) or 'it was killed'}")
            yield found[1]
            if process.poll() is not None:
                raise FarError(f"far serve ended by itself, with {process.returncode}: {_logged(log)}")
        finally:
            late.cancel()
            status = _ended(process)
            signal.signal(signal.SIGTERM, before)
        if said := _logged(log):
            print(f"the server's log, {said.count(chr(10)) + 1} lines, begins:\n{said[:2000]}", file=sys.stderr)
        if status:
            raise FarError(f"far serve ended with {status} after SIGTERM, not 0")


def _ended(process: subprocess.Popen[str]) -> int:
    """The status with which a process ends after SIGTERM."""
    process.terminate()
    try:
        return process.wait(ENDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _logged(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    return str(log.read()).strip()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Seen:
    """A server at a moment: resident bytes, open files and CPU seconds of its process (0 where it does not tell them),
    pictures drawn, requests refused by reason, and batches by their largest size (of the histogram's steps)."""

    memory: float
    files: float
    cpu: float
    pictures: float
    refused: Mapping[str, float]
    batches: Mapping[int, float]

    @classmethod
    def read(cls, text: str) -> Seen:
        """From the text of /metrics."""
        single: dict[str, float] = {}
        refused: dict[str, float] = {}
        up_to: dict[float, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "far_rejections_total":
                    refused[sample.labels["reason"]] = sample.value
                elif sample.name == "far_batch_size_bucket":
                    size = float(sample.labels["le"])
                    up_to[size] = up_to.get(size, 0.0) + sample.value
                elif sample.name == "far_pictures_total" or not sample.labels:
                    single[sample.name] = single.get(sample.name, 0.0) + sample.value
        sizes = sorted(up_to)
        each = {size: up_to[size] - (up_to[before] if before else 0) for before, size in pairwise([0.0, *sizes])}
        return cls(
            memory=single.get("process_resident_memory_bytes", 0.0),
            files=single.get("process_open_fds", 0.0),
            cpu=single.get("process_cpu_seconds_total", 0.0),
            pictures=single.get("far_pictures_total", 0.0),
            refused=refused,
            batches={int(size): count for size, count in each.items() if count and size != float("inf")},
        )


def check_loopback(url: str) -> None:
    """FarError for an address that is not of this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            return
    raise FarError(f"--url {url}: not of this machine; press a server elsewhere only if it is yours, with --elsewhere")
