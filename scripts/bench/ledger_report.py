"""The ledger's results: JSON of one system, and a Markdown table of all."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from bench.ledger_measurement import Case, Measurements
from far_export.onnx.quantize import STAGES as QUANTISED

HEADLINE = {"var-d16": "official"}
"""The preset of the headline, where it is not "balanced"."""


def report(measured: Measurements, rates: Mapping[str, float]) -> dict[str, Any]:
    """The JSON of one system; rates: the machine's matmul rates by precision, in operations per second."""
    rows = [row(measured, case, rates) for case in measured.far_deploy]
    headline = HEADLINE.get(measured.system, "balanced")
    best = min((row for row in rows if row["preset"] == headline and row["batch"] == 1), key=lambda row: row["seconds"])
    return {
        "seconds_reference": measured.released_seconds("fp32"),
        "seconds": best["seconds"],
        "ratio": best["ratio"]["fp32"],
        "engine": f"{best['engine']} ({best['precision']} bundle)",
        "preset": best["preset"],
        "released": {
            variant: {
                "seconds": measured.released_seconds(variant),
                "parts": {part: statistics.median(seconds) for part, seconds in parts.items()},
                "calls": measured.counts[variant],
                "whole_level": measured.levels.get(variant),
            }
            for variant, parts in measured.released.items()
        },
        "released_flops": measured.released_flops,
        "rows": rows,
    }


def row(measured: Measurements, case: Case, rates: Mapping[str, float]) -> dict[str, Any]:
    """The JSON of one case of far-deploy; times and operations are of one picture."""
    seconds, rounds = measured.seconds(case), measured.far_deploy[case]
    flops = measured.flops[case.preset]
    return {
        **case._asdict(),
        "seconds": seconds,
        "stages": {
            stage: statistics.median(times.get(stage, 0.0) for times in rounds) / case.batch
            for stage in rounds[0]
            if stage
        },
        "flops": sum(flops.values()),
        "floor": floor(case.precision, flops, rates),
        "ratio": {variant: (measured.released_seconds(variant) or 0.0) / seconds for variant in measured.released},
    }


def floor(precision: str, flops: Mapping[str, float], rates: Mapping[str, float]) -> float:
    """Seconds of the arithmetic alone at the machine's matmul rates: INT8 where the bundle is, the rest in BF16."""
    return sum(
        operations / rates["int8" if precision == "int8" and stage in QUANTISED else "bf16"]
        for stage, operations in flops.items()
    )


def table(result: Mapping[str, Any], rates: Mapping[str, float]) -> str:
    """Markdown of all systems; result: their JSON by name."""
    lines = [
        "matrix products: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()),
        "",
        "| system | what | TFLOP | floor s | seconds | to fp32 | to bf16 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for system, report in result.items():
        released = {variant: timed["seconds"] for variant, timed in report["released"].items()}
        rows = []
        for variant, seconds in released.items():
            least = report["released_flops"] / rates["bf16" if variant == "bf16" else "fp32"]
            rows.append((f"released, {variant}", report["released_flops"], least, f"{seconds:.1f}", seconds))
        for case in report["rows"]:
            what = f"ours, {case['preset']}, {case['precision']}"
            what += f", {case['batch']} at once" if case["batch"] > 1 else ""
            rows.append((what, case["flops"], case["floor"], f"{case['seconds']:.2f}", case["seconds"]))
        for what, flops, least, shown, seconds in rows:
            ratios = f"{released['fp32'] / seconds:.1f} | {released['bf16'] / seconds:.1f}"
            lines.append(f"| {system} | {what} | {flops / 1e12:.2f} | {least:.1f} | {shown} | {ratios} |")
    return "\n".join(lines)
