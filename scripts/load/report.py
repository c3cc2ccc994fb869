"""What a load test tells: numbers as JSON, and the same as lines."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from clients import REFUSED
from run import Result

SHARES = (50, 95, 99)
DIFFERENCE = 1
"""Of 255: what the batch's size may change of a picture, by the engine's rounding."""
NAMES = "batched", "one by one"
"""Of the two servers of a comparison."""
PARTS = 10
MB = 1e6

Reported = tuple[dict[str, Any], list[str], bool]
"""Numbers, lines, and whether something failed."""


def machine() -> dict[str, Any]:
    """Cores, and processes that ran or waited over 1, 5 and 15 minutes (where the system tells)."""
    return {"cores": os.cpu_count(), "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None}


def report(made: Result) -> Reported:
    """Of one run."""
    numbers = numbers_of(made)
    seconds, errors, memory = numbers["seconds"], numbers["errors"], numbers["memory"]
    lines = [
        f"{numbers['requests']} requests in {seconds:.1f} s, {numbers['pictures']} pictures: "
        f"{numbers['requests'] / seconds:.2f} requests/s, {numbers['pictures'] / seconds:.2f} pictures/s",
        f"refused with 429: {numbers['refused']}; errors: "
        + (", ".join(f"{what}: {count}" for what, count in errors.items()) or "none"),
        "",
        f"{'seconds':26}{'n':>8}" + "".join(f"{f'p{share}':>9}" for share in SHARES) + f"{'largest':>9}",
    ]
    for name, of in numbers["latencies"].items():
        if of["n"]:
            shown = "".join(f"{of[key]:9.3f}" for key in (*(f"p{share}" for share in SHARES), "largest"))
            lines.append(f"{name:26}{of['n']:8}{shown}")
    parts = " ".join(f"{part:.0f}" for part in memory["parts"])
    lines.append("")
    if made.after is None:
        lines.append(
            f"server: {memory['ready']:.0f} MB when ready, {memory['warm']:.0f} warm, {memory['largest']:.0f} at most; "
            f"by tenths of the run {parts}"
        )
    else:
        sizes = ", ".join(f"{size}: {count}" for size, count in numbers["batches"].items())
        lines += [
            f"batches of up to so many pictures: {sizes}",
            f"server: {memory['ready']:.0f} MB when ready, {memory['warm']:.0f} warm, {memory['end']:.0f} at the end, "
            f"{memory['largest']:.0f} at most; by tenths of the run {parts}",
            f"server: {numbers['cores']:.2f} cores busy; {numbers['files'][0]:.0f} files and connections open when "
            f"warm, {numbers['files'][1]:.0f} at the end",
        ]
    if made.differences:
        lines.append(
            f"{len(made.differences)} of the pictures drawn again alone: largest difference "
            f"{max(made.differences)} of 255"
        )
    lines += [f"FAILED: {what}" for what in numbers["broken"]]
    return numbers, lines, bool(errors or numbers["broken"]) or max(made.differences, default=0) > DIFFERENCE


def comparison(turns: Sequence[tuple[Result, Result]]) -> Reported:
    """Of two servers in turn: pictures a second with batches and one by one, and their ratio (None: nothing was drawn
    one by one)."""
    rates = [[sum(one.pictures for one in made.outcomes) / made.seconds for made in turn] for turn in turns]
    ratios = [together / alone if alone else None for together, alone in rates]
    lines = [f"{'round':8}{'batched':>12}{'one by one':>12}{'ratio':>8}    pictures a second"]
    for i, ((together, alone), ratio) in enumerate(zip(rates, ratios, strict=True)):
        lines.append(f"{i + 1:<8}{together:12.2f}{alone:12.2f}{math.nan if ratio is None else ratio:8.2f}")
    found = [ratio for ratio in ratios if ratio is not None]
    middle = statistics.median(found) if found else None
    if middle is not None:
        lines.append(f"batching draws {middle:.2f} times as many (median; {min(found):.2f} to {max(found):.2f})")
    numbers = [[numbers_of(made) for made in turn] for turn in turns]
    for i, name in enumerate(NAMES):
        whole = [turn[i]["latencies"]["whole answer"] for turn in numbers]
        if middles := [of["p50"] for of in whole if of["n"]]:
            lines.append(f"{name}: p50 of the whole answer {statistics.median(middles):.3f} s")
    failed = False
    for i, turn in enumerate(numbers):
        for name, each in zip(NAMES, turn, strict=True):
            wrong = [*(f"{what}: {count}" for what, count in each["errors"].items()), *each["broken"]]
            lines += [f"FAILED: round {i + 1}, {name}: {what}" for what in wrong]
            failed = failed or bool(wrong)
    return {"ratio": middle, "ratios": ratios, "rounds": numbers}, lines, failed


def numbers_of(made: Result) -> dict[str, Any]:
    """A run in numbers; memory in MB. None: what a server that did not answer at the end did not tell."""
    after = made.after
    right = [one for one in made.outcomes if not one.error]
    wrong = Counter(one.error for one in made.outcomes if one.error)
    latencies = {
        "whole answer": [one.seconds for one in right],
        "plain requests": [one.seconds for one in right if not one.stream],
        "streams": [one.seconds for one in right if one.stream],
        "first level of a stream": [one.first for one in right if one.first is not None],
    }
    drawn = after.batches if after else {}
    batches = {
        size: int(count - made.warm.batches.get(size, 0))
        for size, count in drawn.items()
        if count > made.warm.batches.get(size, 0)
    }
    pictures = sum(one.pictures for one in made.outcomes)
    none = [] if pictures else ["no picture came"]
    parts = [float(np.mean(part)) / MB for part in np.array_split(made.memory, PARTS) if len(part)]
    memory = {"ready": made.before.memory / MB, "warm": made.warm.memory / MB}
    end = after.memory / MB if after else None
    return {
        "requests": len(made.outcomes),
        "pictures": pictures,
        "seconds": made.seconds,
        "refused": sum(count for what, count in wrong.items() if what.startswith(REFUSED)),
        "errors": {what: count for what, count in wrong.items() if not what.startswith(REFUSED)},
        "latencies": {name: spread(of) for name, of in latencies.items()},
        "batches": batches,
        "memory": {**memory, "end": end, "largest": max(made.memory, default=0.0) / MB, "parts": parts},
        "cores": (after.cpu - made.warm.cpu) / made.seconds if after else None,
        "files": [made.warm.files, after.files if after else None],
        "differences": made.differences,
        "broken": [*none, *made.broken],
        "server": asdict(after) if after else None,
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """How many, and percentiles."""
    if not seconds:
        return {"n": 0}
    shares = {f"p{share}": float(np.percentile(seconds, share)) for share in SHARES}
    return {"n": len(seconds), **shares, "largest": max(seconds)}
