"""The report of a load test: numbers for JSON, and the same as lines of text."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from clients import REJECTED
from run import Result

PERCENTILES = (50, 95, 99)
MAX_DIFFERENCE = 1
"""Of 255: how far the rounding of another batch size may change a picture."""
NAMES = "batched", "one by one"
"""The two servers of a comparison."""
PARTS = 10
"""Of a test's time, for which the memory is reported."""
MB = 1e6

Report = tuple[dict[str, Any], list[str], bool]
"""Numbers, lines, and whether the test failed."""


def machine() -> dict[str, Any]:
    """Cores, and the load average over 1, 5 and 15 minutes if the system tells it."""
    return {"cores": os.cpu_count(), "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None}


def report(result: Result) -> Report:
    """The report of one load test."""
    numbers = numbers_of(result)
    lines = [*_request_lines(numbers), "", *_server_lines(numbers)]
    if result.differences:
        lines.append(
            f"{len(result.differences)} of the pictures drawn again alone: largest difference "
            f"{max(result.differences)} of 255"
        )
    lines += [f"FAILED: {failure}" for failure in numbers["broken"]]
    differs = max(result.differences, default=0) > MAX_DIFFERENCE
    return numbers, lines, bool(numbers["errors"] or numbers["broken"]) or differs


def _request_lines(numbers: dict[str, Any]) -> list[str]:
    seconds, errors = numbers["seconds"], numbers["errors"]
    lines = [
        f"{numbers['requests']} requests in {seconds:.1f} s, {numbers['pictures']} pictures: "
        f"{numbers['requests'] / seconds:.2f} requests/s, {numbers['pictures'] / seconds:.2f} pictures/s",
        f"refused with 429: {numbers['refused']}; errors: "
        + (", ".join(f"{error}: {count}" for error, count in errors.items()) or "none"),
        "",
        f"{'seconds':26}{'n':>8}" + "".join(f"{f'p{share}':>9}" for share in PERCENTILES) + f"{'largest':>9}",
    ]
    for name, latency in numbers["latencies"].items():
        if latency["n"]:
            columns = (*(f"p{share}" for share in PERCENTILES), "largest")
            lines.append(f"{name:26}{latency['n']:8}" + "".join(f"{latency[column]:9.3f}" for column in columns))
    return lines


def _server_lines(numbers: dict[str, Any]) -> list[str]:
    memory = numbers["memory"]
    at_end = "" if memory["end"] is None else f"{memory['end']:.0f} at the end, "
    parts = " ".join(f"{part:.0f}" for part in memory["parts"])
    memory_line = (
        f"server: {memory['ready']:.0f} MB when ready, {memory['warm']:.0f} warm, {at_end}"
        f"{memory['largest']:.0f} at most; by tenths of the run {parts}"
    )
    if memory["end"] is None:
        return [memory_line]
    sizes = ", ".join(f"{size}: {count}" for size, count in numbers["batches"].items())
    return [
        f"batches of up to so many pictures: {sizes}",
        memory_line,
        f"server: {numbers['cores']:.2f} cores busy; {numbers['files'][0]:.0f} files and connections open when "
        f"warm, {numbers['files'][1]:.0f} at the end",
    ]


def comparison(rounds: Sequence[tuple[Result, Result]]) -> Report:
    """The report of two servers that were tested in turn: pictures a second with batches and one by one.

    The ratio of a round is None if nothing was drawn one by one.
    """
    rates = [
        [sum(outcome.pictures for outcome in result.outcomes) / result.seconds for result in pair] for pair in rounds
    ]
    ratios = [batched / unbatched if unbatched else None for batched, unbatched in rates]
    lines = [f"{'round':8}{'batched':>12}{'one by one':>12}{'ratio':>8}    pictures a second"]
    for i, ((batched, unbatched), ratio) in enumerate(zip(rates, ratios, strict=True)):
        lines.append(f"{i + 1:<8}{batched:12.2f}{unbatched:12.2f}{math.nan if ratio is None else ratio:8.2f}")
    known_ratios = [ratio for ratio in ratios if ratio is not None]
    median = statistics.median(known_ratios) if known_ratios else None
    if median is not None:
        spread = f"{min(known_ratios):.2f} to {max(known_ratios):.2f}"
        lines.append(f"batching draws {median:.2f} times as many (median; {spread})")
    numbers = [[numbers_of(result) for result in pair] for pair in rounds]
    for i, name in enumerate(NAMES):
        latencies = [pair[i]["latencies"]["whole answer"] for pair in numbers]
        if medians := [latency["p50"] for latency in latencies if latency["n"]]:
            lines.append(f"{name}: p50 of the whole answer {statistics.median(medians):.3f} s")
    failures = [
        f"FAILED: round {i + 1}, {name}: {failure}"
        for i, pair in enumerate(numbers)
        for name, result in zip(NAMES, pair, strict=True)
        for failure in (*(f"{error}: {count}" for error, count in result["errors"].items()), *result["broken"])
    ]
    return {"ratio": median, "ratios": ratios, "rounds": numbers}, [*lines, *failures], bool(failures)


def numbers_of(result: Result) -> dict[str, Any]:
    """A load test in numbers, memory in MB; None for what a server that did not answer at the end did not tell."""
    after, warm = result.after, result.warm
    finished = [outcome for outcome in result.outcomes if not outcome.error]
    errors = Counter(outcome.error for outcome in result.outcomes if outcome.error)
    latencies = {
        "whole answer": [outcome.seconds for outcome in finished],
        "plain requests": [outcome.seconds for outcome in finished if not outcome.stream],
        "streams": [outcome.seconds for outcome in finished if outcome.stream],
        "first level of a stream": [outcome.first_level for outcome in finished if outcome.first_level is not None],
    }
    batches = {size: int(count - warm.batches.get(size, 0)) for size, count in (after.batches if after else {}).items()}
    pictures = sum(outcome.pictures for outcome in result.outcomes)
    return {
        "requests": len(result.outcomes),
        "pictures": pictures,
        "seconds": result.seconds,
        "refused": sum(count for error, count in errors.items() if error.startswith(REJECTED)),
        "errors": {error: count for error, count in errors.items() if not error.startswith(REJECTED)},
        "latencies": {name: percentiles(seconds) for name, seconds in latencies.items()},
        "batches": {size: count for size, count in batches.items() if count > 0},
        "memory": {
            "ready": result.before.memory / MB,
            "warm": warm.memory / MB,
            "end": after.memory / MB if after else None,
            "largest": max(result.memory, default=0.0) / MB,
            "parts": [float(np.mean(part)) / MB for part in np.array_split(result.memory, PARTS) if len(part)],
        },
        "cores": (after.cpu - warm.cpu) / result.seconds if after else None,
        "files": [warm.files, after.files if after else None],
        "differences": result.differences,
        "broken": [*([] if pictures else ["no picture came"]), *result.broken],
        "server": asdict(after) if after else None,
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """How many there are, some percentiles, and the largest."""
    if not seconds:
        return {"n": 0}
    shares = {f"p{share}": float(np.percentile(seconds, share)) for share in PERCENTILES}
    return {"n": len(seconds), **shares, "largest": max(seconds)}
