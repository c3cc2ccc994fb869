"""scripts/bench_ledger.py: what it writes has the promised keys, and its reference counts every call of the loop."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from bench import ledger_plot
from bench.ledger_measurement import ENGINE, Case, Measurements, released_flops
from bench.ledger_processes import BundlePipeline, ReleasedLoop
from bench.ledger_report import floor, report, table
from far_runtime.bundle import open_bundle
from far_runtime.errors import FarError
from far_runtime.sampling.flops import picture_cost
from far_runtime.sampling.settings import resolve_plan

if TYPE_CHECKING:
    from conftest import Tiny

RATES = {"fp32": 1e11, "bf16": 2e11, "int8": 4e11}


def home(tiny: Tiny, system: str, folder: Path) -> Path:
    """A folder as `bundle_of` leaves it: checkpoints, and the bundle beside them."""
    checkpoint, bundle = (tiny.far, tiny.bundle) if system == "far" else (tiny.mar, tiny.mar_bundle)
    shutil.copy(checkpoint, folder / "checkpoint-last.pth")
    shutil.copy(tiny.vae, folder / "vae.pth")
    shutil.copytree(bundle, folder / "fp32", ignore=shutil.ignore_patterns("engines"))
    return folder


def measurements(counts: dict[str, int], parts: dict[str, float], manifest: Any) -> Measurements:
    """Measurements of far-b whose medians are the given seconds by part."""
    measured = Measurements("far-b")
    for name, factor in (("fp32", 1.0), ("bf16", 0.5)):
        measured.counts[name] = counts
        measured.released[name] = {
            part: [9.0 * median * factor, median * factor, 0.0] for part, median in parts.items()
        }
    for preset, seconds in (("quality", 5.0), ("balanced", 4.0)):
        plan = resolve_plan(manifest, {"preset": preset})[1]
        measured.flops[preset] = picture_cost(manifest, plan)
        measured.far_deploy[Case("int8", ENGINE, preset, 1)] = [{"": seconds, "denoise": 1.0}]
    return measured


def test_a_report_has_the_promised_keys_and_sums_medians_times_calls(tiny: Tiny, tmp_path: Path) -> None:
    manifest = open_bundle(tiny.bundle).manifest
    measured = measurements({"transformer": 4, "head": 400}, {"transformer": 2.0, "head": 0.5}, manifest)
    result = report(measured, RATES)
    assert {"seconds_reference", "seconds", "ratio", "engine", "preset"} <= set(result)
    assert result["seconds_reference"] == 4 * 2.0 + 400 * 0.5
    assert result["preset"] == "balanced" and result["seconds"] == 4.0  # not the slower one, nor the mean
    assert result["ratio"] == 208 / 4
    assert result["rows"][1]["ratio"]["bf16"] == 104 / 4
    shown = table({"far-b": json.loads(json.dumps(result))}, RATES)
    assert "| 52.0 | 26.0 |" in shown
    (tmp_path / "ledger.json").write_text(json.dumps({"far-b": result, "rates": RATES}))
    ledger_plot.save_plot(ledger_plot.read_ledgers([tmp_path / "ledger.json"]), tmp_path / "ledger.png")
    assert (tmp_path / "ledger.png").read_bytes().startswith(b"\x89PNG")


def test_the_floor_takes_int8_for_what_was_quantised_only() -> None:
    flops = {"transformer": 4e11, "denoise": 3e11, "decode": 1e11, "condition": 2e11}
    assert floor("int8", flops, RATES) == pytest.approx(3.0)
    assert floor("bf16", flops, RATES) == pytest.approx(5.0)


def test_the_released_loop_is_charged_for_both_halves_of_every_step(tiny: Tiny) -> None:
    manifest = open_bundle(tiny.bundle).manifest
    guided = resolve_plan(manifest, {"preset": "official"})[1]
    assert guided[0].guidance == 1  # its first level is not guided, and the released code computes both halves
    alone = replace(guided[0], calls=tuple(replace(call, rows=2) for call in guided[0].calls))
    least = sum(picture_cost(manifest, guided).values())
    assert released_flops(manifest, guided) == pytest.approx(sum(picture_cost(manifest, (alone, *guided[1:])).values()))
    assert released_flops(manifest, guided) > least


@pytest.mark.parametrize("system", ["far", "mar"])
def test_every_call_of_the_released_loop_is_counted_and_can_be_run(tiny: Tiny, tmp_path: Path, system: str) -> None:
    folder = home(tiny, system, tmp_path)
    manifest = open_bundle(folder / "fp32").manifest
    plan = resolve_plan(manifest, {"preset": "official"})[1]
    released = ReleasedLoop(folder, amp=False)
    counts = released.open()
    heads = [count for part, count in counts.items() if part.startswith("head")]
    transformers = [count for part, count in counts.items() if part.startswith("transformer")]
    assert sum(heads) == 100 * len(plan) and sum(transformers) == len(plan) and counts["decode"] == 1
    assert all(released.part(part) > 0 for part in counts)


def test_our_pictures_are_drawn_by_the_ordinary_pipeline_of_new_classes_each_time(tiny: Tiny, tmp_path: Path) -> None:
    folder = home(tiny, "far", tmp_path)
    pipeline = BundlePipeline(folder / "fp32", "onnxruntime")
    assert pipeline.open().startswith("onnxruntime")
    seconds = pipeline.generate({"preset": "fast"}, 2)
    assert {"", "transformer", "denoise", "decode"} <= set(seconds)
    assert pipeline._count == 2 and pipeline.generate({"preset": "fast"}, 1)[""] > 0 and pipeline._count == 3


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(FarError, match=r"bench_ledger\.py --json"):
        ledger_plot.read_ledgers([tmp_path / "a.json"])
    with pytest.raises(click.ClickException, match="cannot be read"):
        ledger_plot.main(["missing.json", "x.png"], standalone_mode=False)
