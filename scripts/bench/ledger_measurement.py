"""Measures one system of the ledger: the released loop and far-deploy's bundles, in interleaved rounds."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from bench.export_memory import export, run_apart, write_checkpoints
from bench.ledger_processes import BundlePipeline, ReleasedLoop, running
from far_runtime.bench.engine_specs import CPU
from far_runtime.bench.matmul_rate import MatmulRate
from far_runtime.bench.worker_process import Worker
from far_runtime.bundle import Manifest, open_bundle
from far_runtime.errors import FarError
from far_runtime.sampling.base import Step
from far_runtime.sampling.flops import call_flops, picture_cost
from far_runtime.sampling.presets import preset_names
from far_runtime.sampling.settings import plan_of, resolve_settings

SYSTEMS = {
    "far-b": "far_base",
    "far-l": "far_large",
    "far-h": "far_huge",
    "mar-b": "mar_base",
    "var-d16": "var_d16",
}
"""The official models, and the presets of their sizes."""

ENGINE = "openvino:cpu:bf16"
"""What is not INT8 in a bundle is computed in BF16."""

CALLS = 3
"""Calls of every part of the released loop in a round."""


class Case(NamedTuple):
    """A way to generate pictures with far-deploy."""

    precision: str
    engine: str
    preset: str
    batch: int


@dataclass
class Measurements:
    """Everything that was measured of one system, times in seconds."""

    system: str

    released: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Times of one call of the released loop, by variant ("fp32", "bf16", "compile") and part."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Calls per picture, by variant and part."""

    levels: dict[str, float] = field(default_factory=dict)
    """Time of one whole level, by variant; only with --whole."""

    far_deploy: dict[Case, list[dict[str, float]]] = field(default_factory=dict)
    """Times of a batch by stage ("": in all), a dictionary per round."""

    flops: dict[str, dict[str, float]] = field(default_factory=dict)
    """Operations of a picture, by preset and stage."""

    released_flops: float = 0.0
    """Operations of a picture by the released loop."""

    def released_seconds(self, variant: str) -> float | None:
        """Seconds of a picture by the released loop: the medians of the parts times their calls."""
        parts = self.released.get(variant)
        if not parts:
            return None
        return sum(statistics.median(seconds) * self.counts[variant][part] for part, seconds in parts.items())

    def seconds(self, case: Case) -> float:
        """Median seconds of a picture by far-deploy."""
        return statistics.median(times[""] for times in self.far_deploy[case]) / case.batch


@dataclass(frozen=True)
class LedgerOptions:
    """What the command was asked to measure."""

    folder: Path
    """Folder for checkpoints and bundles."""

    precisions: Sequence[str]
    """Precisions of the bundles."""

    rounds: int

    quick: bool
    """Without batches of four and without torch.compile."""

    whole: bool
    """Also one whole level of FAR's released loop."""


def measure(system: str, options: LedgerOptions) -> Measurements:
    """Measure a system; one variant of the released loop at a time, so that memory need not hold them all."""
    size = SYSTEMS[system]
    bundles = {precision: bundle_of(options.folder, size, precision) for precision in options.precisions}
    manifest = open_bundle(bundles[options.precisions[0]], check=False).manifest
    official = resolve_settings(manifest, {"preset": "official"})
    measured = Measurements(system, released_flops=released_flops(manifest, plan_of(manifest, official)))
    # The bundles' own levels and iterations are few, to make their export short.
    loop = {name: official[name] for name in ("levels", "iterations") if name in official}
    settings = {name: resolve_settings(manifest, {"preset": name, **loop}) for name in preset_names(manifest)}
    measured.flops = {name: picture_cost(manifest, plan_of(manifest, values)) for name, values in settings.items()}
    presets = {name: values for name, values in settings.items() if name != "official" or system == "var-d16"}
    variants = {"fp32": (False, False), "bf16": (True, False)} | ({} if options.quick else {"compile": (False, True)})
    for variant, (amp, compiled) in variants.items():
        with contextlib.ExitStack() as stack:
            released = stack.enter_context(running(ReleasedLoop(options.folder / size, amp, compiled)))
            measured.counts[variant] = released.call("open")
            measured.released.setdefault(variant, {part: [] for part in measured.counts[variant]})
            pipelines = {
                precision: stack.enter_context(running(BundlePipeline(path, ENGINE)))
                for precision, path in bundles.items()
            }
            for worker in pipelines.values():
                worker.call("open")
            for done in range(options.rounds + 1):
                measure_round(measured, variant, released, pipelines, presets, options.quick, warm_up=not done)
            if options.whole and manifest.system == "far":
                measured.levels[variant] = released.call("level")
    return measured


def measure_round(
    measured: Measurements,
    variant: str,
    released: Worker,
    pipelines: dict[str, Worker],
    presets: dict[str, dict[str, Any]],
    quick: bool,
    warm_up: bool,
) -> None:
    """One round: every part of the released loop, then every case. A warm-up is short, and its times are dropped."""
    for part, times in measured.released[variant].items():
        seconds = [released.call("part", part) for _ in range(1 if warm_up else CALLS)]
        times += [] if warm_up else seconds
    for precision, worker in pipelines.items():
        for preset, settings in list(presets.items())[-1:] if warm_up else presets.items():
            for batch in (1,) if quick else (1, 4):
                stages = worker.call("generate", settings, batch)
                if not warm_up:
                    measured.far_deploy.setdefault(Case(precision, ENGINE, preset, batch), []).append(stages)


def bundle_of(folder: Path, size: str, precision: str) -> Path:
    """The bundle of a model size, exported unless it is there; its random checkpoints lie beside it."""
    home = folder / size
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "vae.pth").exists():
        write_checkpoints(size, home)
    target = home / precision
    with contextlib.suppress(FarError):
        open_bundle(target, check=False)
        return target
    seconds, peak = run_apart(export, home, size, precision, target)
    click.echo(f"{size} in {precision}: exported in {seconds:.0f} s, at most {peak / 1e9:.1f} GB", err=True)
    return target


def released_flops(manifest: Manifest, official: Sequence[Step]) -> float:
    """Operations of a picture by the released loop, with both halves of guidance at every step.

    Not counted are the embeddings that it repeats, and what MAR's last block computes of tokens that nothing reads.
    """
    costs = [
        call_flops(manifest, replace(call, rows=2) if call.stage in ("transformer", "denoise") else call)
        for step in official
        for call in step.calls
    ]
    return sum(costs) + picture_cost(manifest, official)["decode"]


def matmul_rates(rounds: int) -> dict[str, float]:
    """Operations per second of the machine's matrix products by precision: the best method and round."""
    targets = tuple((CPU, precision) for precision in ("fp32", "bf16", "int8"))
    with running(MatmulRate(targets, {"torch": "far_export.torch_plugin"})) as worker:
        worker.call("open")
        measured = [worker.call("measure") for _ in range(rounds + 1)]
    return {target[1]: max(max(rates[target].values()) for rates in measured if rates[target]) for target in targets}
