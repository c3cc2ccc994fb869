"""The speed ledger: what a picture takes with the released code and with ours, at the true sizes, in one run.

    python scripts/bench_ledger.py [--quick] [--system far-b ...] [--json FILE] [--plot FILE.png] [--keep DIR]

Checkpoints of the official sizes with random weights are exported (--keep DIR: once, a later run finds them there) and
drawn through the ordinary Pipeline, one picture at a time. The released loop (scripts/bench/released.py) would take
minutes a picture, so its calls are timed one by one and multiplied by their number; --whole also runs one whole level
of it, to show that this holds. VAR's is run whole. Both sides are measured in turn, round by round, each in a process
of its own; medians over the rounds. The floor is the arithmetic at the rate of the machine's matrix products. A preset
is the one for bundles that were not tuned: with random weights there is nothing to tune.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.export_memory import export, run_apart, write_checkpoints
from bench.ledger_plot import save_plot
from far_export.onnx.quantize import STAGES as QUANTISED
from far_runtime.bench.engine_specs import CPU
from far_runtime.bench.matmul_rate import MatmulRate
from far_runtime.bench.worker_process import Worker
from far_runtime.bundle import Manifest, open_bundle
from far_runtime.errors import FarError
from far_runtime.plotting import check_plot
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
PRECISIONS = ("int8",)
"""Of the bundles that are drawn unless --precision names others."""

HINT = "openvino:cpu:bf16"
"""The engine: what is not int8 is computed in BF16."""

HEADLINE = {"var-d16": "official"}
"""The preset of the headline, where it is not balanced."""

EIGHTH = 8
"""MAR's transformer is timed at every eighth iteration."""

STEPS = 100
CALLS = 3
"""Of every part of the released loop in a round."""

ROUNDS = {True: 1, False: 3}


@dataclass
class Released:
    """A process with the released loop in it."""

    preset: str
    folder: Path
    amp: bool
    compiled: bool = False
    _parts: dict[str, Any] = field(default_factory=dict, init=False)

    def open(self) -> dict[str, int]:
        """Load the checkpoint; the number of calls of each part for a picture."""
        import torch

        from far_export.load import load_pair
        from far_export.stages.vae import DecodeStageModule

        model, decoder = load_pair(self.folder / "checkpoint-last.pth", self.folder / "vae.pth")
        network, vae = model.model.eval(), decoder.model.eval()
        manifest = open_bundle(next(path.parent for path in self.folder.glob("*/manifest.json")), check=False).manifest
        if model.system == "var":
            return self._var(network, vae, resolve_settings(manifest))
        decode = DecodeStageModule(vae, network.config.grid, network.config.latent_scale).eval()
        counts = self._diffusion(network, manifest)
        latents = torch.randn(1, network.config.tokens, network.config.channels)
        self._parts["decode"] = lambda: self._with_autocast(lambda: decode(latents))
        return {**counts, "decode": 1}

    def part(self, name: str) -> float:
        """Seconds of one call of a part."""
        import torch

        started = time.perf_counter()
        with torch.no_grad():
            self._parts[name]()
        return time.perf_counter() - started

    def level(self) -> float:
        """Seconds of one whole level: the transformer once and every diffusion step."""
        return self.part("transformer") + sum(self.part("head") for _ in range(STEPS))

    def _with_autocast(self, compute: Any) -> Any:
        from bench.released import autocast

        with autocast(self.amp):
            return compute()

    def _var(self, var: Any, vqvae: Any, settings: Mapping[str, Any]) -> dict[str, int]:
        from bench.released import ReleasedVAR
        from far_export.stages.vae import DecodeStageModule
        from far_runtime.sampling.noise import SeedNoise

        released = ReleasedVAR(var, vqvae, self.amp, self.compiled)
        decode = DecodeStageModule(vqvae, var.config.patch_nums[-1], 1.0).eval()
        chosen = {name: settings[name] for name in ("guidance", "top_k", "top_p")}

        def whole() -> None:
            latents = released.sample([1], SeedNoise([0]), **chosen)
            self._with_autocast(lambda: decode(latents))

        self._parts["picture"] = whole
        return {"picture": 1}

    def _diffusion(self, model: Any, manifest: Manifest) -> dict[str, int]:
        import torch

        from bench.released import ReleasedFAR
        from far_runtime.sampling.noise import SeedNoise

        config = model.config
        released = ReleasedFAR(model, STEPS, self.amp, self.compiled)
        both, latents = torch.tensor([1, config.classes]), torch.randn(1, config.tokens, config.channels)
        plan = plan_of(manifest, resolve_settings(manifest, {"preset": "official"}))

        def head(tokens: int, level: float | None) -> Any:
            x, noise = torch.randn(2 * tokens, config.channels), torch.randn(2 * tokens, config.channels)
            z = torch.randn(2 * tokens, config.decoder_width)
            return lambda: released.head.step(x, z, STEPS // 2, level, 2.0, 1.0, noise)

        if manifest.system == "far":
            self._parts["transformer"] = lambda: released.transformer(latents, both)
            self._parts["head"] = head(config.tokens, 3.0)
            return {"transformer": len(plan), "head": STEPS * len(plan)}
        noise, counts = SeedNoise([0]), {}
        for start in range(0, len(plan), EIGHTH):
            group = plan[start : start + EIGHTH]
            indices = released.indices(noise, int(group[len(group) // 2].visible))
            name = f"transformer {start + 1}"
            self._parts[name] = lambda indices=indices: released.transformer(latents, both, *indices)
            counts[name] = len(group)
        drawn = [int(step.tokens) for step in plan]
        for tokens in sorted(set(drawn)):
            self._parts[f"head {tokens}"] = head(tokens, None)
            counts[f"head {tokens}"] = STEPS * drawn.count(tokens)
        return counts


@dataclass
class Ours:
    """A process with a bundle on an engine in it."""

    bundle: Path
    engine: str
    _pipeline: Any = field(default=None, init=False)
    _drawn: int = field(default=0, init=False)

    def open(self) -> str:
        """Open the engine; its name."""
        from far_runtime.pipeline import Pipeline

        self._pipeline = Pipeline.from_bundle(self.bundle, self.engine, check=False)
        return str(self._pipeline.engine.name)

    def draw(self, settings: Mapping[str, Any], batch: int) -> dict[str, float]:
        """Seconds of so many pictures of classes that were not drawn before, in all and by stage."""
        from far_runtime.engines.timed import TimedEngine
        from far_runtime.pipeline import Pipeline

        classes = self._pipeline.bundle.manifest.model.classes
        labels = [(self._drawn + i) % classes for i in range(batch)]
        self._drawn += batch
        timed = TimedEngine(self._pipeline.engine)
        started = time.perf_counter()
        made = Pipeline(self._pipeline.bundle, timed).generate(labels, labels, batch_size=batch, **settings)
        seconds = time.perf_counter() - started
        if not np.isfinite(made.latents).all() or float(made.images.std()) == 0:
            raise RuntimeError(f"{self.bundle}: its pictures are flat or not finite, which cannot be timed")
        return {"": seconds, **{stage: sum(calls) for stage, calls in timed.seconds.items()}}


@dataclass
class Found:
    """Seconds by round of everything that was measured of one system."""

    system: str
    released: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    ours: dict[tuple[str, str, str, int], list[dict[str, float]]] = field(default_factory=dict)
    flops: dict[str, dict[str, float]] = field(default_factory=dict)
    released_flops: float = 0.0

    def reference(self, name: str) -> float | None:
        """Seconds of a picture by the released loop: the parts' medians times the numbers of their calls."""
        parts = self.released.get(name)
        if not parts:
            return None
        return sum(statistics.median(seconds) * self.counts[name][part] for part, seconds in parts.items())

    def seconds(self, key: tuple[str, str, str, int]) -> float:
        """Median seconds a picture of ours."""
        return statistics.median(one[""] for one in self.ours[key]) / key[3]


def bundle_of(folder: Path, preset: str, precision: str) -> Path:
    """The bundle of a preset, exported unless it is there; the checkpoints beside it."""
    home = folder / preset
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "vae.pth").exists():
        write_checkpoints(preset, home)
    target = home / precision
    with contextlib.suppress(FarError):
        open_bundle(target, check=False)
        return target
    seconds, peak = run_apart(export, home, preset, precision, target)
    click.echo(f"{preset} in {precision}: exported in {seconds:.0f} s, at most {peak / 1e9:.1f} GB", err=True)
    return target


def measure(system: str, folder: Path, precisions: Sequence[str], rounds: int, quick: bool, whole: bool) -> Found:
    """Everything of one system, in turn."""
    preset = SYSTEMS[system]
    bundles = {precision: bundle_of(folder, preset, precision) for precision in precisions}
    found = Found(system)
    manifest = open_bundle(bundles[precisions[0]], check=False).manifest
    official = plan_of(manifest, resolve_settings(manifest, {"preset": "official"}))
    found.released_flops = released_flops(manifest, official)
    presets = [name for name in preset_names(manifest) if name != "official" or system == "var-d16"]
    # The bundles' own settings are short ones, for their export.
    loop = resolve_settings(manifest, {"preset": "official"})
    loop = {name: loop[name] for name in ("levels", "iterations") if name in loop}
    settings = {name: resolve_settings(manifest, {"preset": name, **loop}) for name in preset_names(manifest)}
    for name, given in settings.items():
        found.flops[name] = picture_cost(manifest, plan_of(manifest, given))
    kinds = {"fp32": (False, False), "bf16": (True, False)} | ({} if quick else {"compile": (False, True)})
    for name, (amp, compiled) in kinds.items():  # one after the other: the networks of all need not fit at once
        with running(Released(preset, folder / preset, amp, compiled)) as worker, contextlib.ExitStack() as stack:
            found.counts[name] = worker.call("open")
            opened = {precision: stack.enter_context(running(Ours(path, HINT))) for precision, path in bundles.items()}
            for one in opened.values():
                one.call("open")
            parts = found.released.setdefault(name, {part: [] for part in found.counts[name]})
            for turn in range(rounds + 1):  # the first warms up
                for part in parts:
                    seconds = [worker.call("part", part) for _ in range(CALLS if turn else 1)]
                    parts[part] += seconds if turn else []
                for precision, one in opened.items():
                    for chosen in presets:
                        if not turn and chosen != presets[-1]:
                            continue
                        for batch in (1,) if quick else (1, 4):
                            drawn = one.call("draw", settings[chosen], batch)
                            if turn:
                                found.ours.setdefault((precision, HINT, chosen, batch), []).append(drawn)
            if whole and manifest.system == "far":
                found.levels[name] = worker.call("level")
    return found


def released_flops(manifest: Manifest, official: Sequence[Step]) -> float:
    """Operations of a picture by the released loop: both halves at every step, but not the embeddings that it repeats,
    nor what its last block computes of tokens that nothing reads (MAR)."""
    costs = [
        call_flops(manifest, replace(call, rows=2) if call.stage in ("transformer", "denoise") else call)
        for step in official
        for call in step.calls
    ]
    return sum(costs) + picture_cost(manifest, official)["decode"]


@contextlib.contextmanager
def running(session: Any) -> Iterator[Worker]:
    """A session in a process that ends with the block."""
    worker = Worker(session)
    try:
        yield worker
    finally:
        worker.close()


def machine_rates(rounds: int) -> dict[str, float]:
    """Operations a second of the machine's matrix products, the best method of each precision."""
    kinds = tuple((CPU, precision) for precision in ("fp32", "bf16", "int8"))
    with running(MatmulRate(kinds, {"torch": "far_export.torch_plugin"})) as worker:
        worker.call("open")
        measured = [worker.call("measure") for _ in range(rounds + 1)]
    return {kind[1]: max(max(one[kind].values()) for one in measured if one[kind]) for kind in kinds}


def floor(manifest_precision: str, flops: Mapping[str, float], rates: Mapping[str, float]) -> float:
    """Seconds that the arithmetic alone takes at the machine's rates: int8 where it is, the rest in BF16."""
    return sum(
        value / rates["int8" if manifest_precision == "int8" and stage in QUANTISED else "bf16"]
        for stage, value in flops.items()
    )


def row(found: Found, key: tuple[str, str, str, int], rates: Mapping[str, float]) -> dict[str, Any]:
    """What was measured of ours with one bundle, engine, preset and batch, a picture."""
    precision, engine, preset, batch = key
    seconds, drawn = found.seconds(key), found.ours[key]
    return {
        "precision": precision,
        "engine": engine,
        "preset": preset,
        "batch": batch,
        "seconds": seconds,
        "stages": {
            stage: statistics.median(one.get(stage, 0.0) for one in drawn) / batch for stage in drawn[0] if stage
        },
        "flops": sum(found.flops[preset].values()),
        "floor": floor(precision, found.flops[preset], rates),
        "ratio": {name: (found.reference(name) or 0.0) / seconds for name in found.released},
    }


def report(found: Found, rates: Mapping[str, float]) -> dict[str, Any]:
    """The JSON of one system."""
    rows = [row(found, key, rates) for key in found.ours]
    headline = HEADLINE.get(found.system, "balanced")
    best = min((row for row in rows if row["preset"] == headline and row["batch"] == 1), key=lambda row: row["seconds"])
    return {
        "seconds_reference": found.reference("fp32"),
        "seconds": best["seconds"],
        "ratio": best["ratio"]["fp32"],
        "engine": f"{best['engine']} ({best['precision']} bundle)",
        "preset": best["preset"],
        "released": {
            name: {
                "seconds": found.reference(name),
                "parts": {part: statistics.median(seconds) for part, seconds in parts.items()},
                "calls": found.counts[name],
                "whole_level": found.levels.get(name),
            }
            for name, parts in found.released.items()
        },
        "released_flops": found.released_flops,
        "rows": rows,
    }


def table(result: Mapping[str, Any], rates: Mapping[str, float]) -> str:
    """Markdown of all systems."""
    lines = [
        "matrix products: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()),
        "",
        "| system | what | TFLOP | floor s | seconds | to fp32 | to bf16 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for system, found in result.items():
        released = {name: one["seconds"] for name, one in found["released"].items()}
        flops, bf16 = found["released_flops"] / 1e12, released["bf16"]
        for name, seconds in released.items():
            least = found["released_flops"] / rates["bf16" if name == "bf16" else "fp32"]
            line = f"| {system} | released, {name} | {flops:.2f} | {least:.1f} | {seconds:.1f} "
            lines.append(line + f"| {released['fp32'] / seconds:.1f} | {bf16 / seconds:.1f} |")
        for row in found["rows"]:
            what = f"ours, {row['preset']}, {row['precision']}" + (
                f", {row['batch']} at once" if row["batch"] > 1 else ""
            )
            seconds = row["seconds"]
            line = f"| {system} | {what} | {row['flops'] / 1e12:.2f} | {row['floor']:.1f} | {seconds:.2f} "
            lines.append(line + f"| {released['fp32'] / seconds:.1f} | {bf16 / seconds:.1f} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--system", "systems", multiple=True, type=click.Choice(list(SYSTEMS)), help="Default: all.")
@click.option("--precision", "precisions", multiple=True, help="Of our bundles. Default: int8.")
@click.option("--quick", is_flag=True, help="One round, one picture at a time, without torch.compile.")
@click.option("--whole", is_flag=True, help="Also one whole level of FAR's released loop.")
@click.option("--rounds", type=click.IntRange(min=1), help="Default: 3; quick: 1.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Everything as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Seconds of all as a picture (PNG or SVG).")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for checkpoints and bundles.")
def main(
    systems: tuple[str, ...],
    precisions: tuple[str, ...],
    quick: bool,
    whole: bool,
    rounds: int | None,
    file: Path | None,
    plot: Path | None,
    keep: Path | None,
) -> None:
    if plot is not None:
        check_plot(plot)  # before the minutes that it takes
    rounds = rounds or ROUNDS[quick]
    with tempfile.TemporaryDirectory() as aside:
        rates = machine_rates(rounds)
        result = {}
        for system in systems or SYSTEMS:
            chosen = precisions or PRECISIONS
            result[system] = report(measure(system, keep or Path(aside), chosen, rounds, quick, whole), rates)
            one = result[system]
            click.echo(
                f"{system}: {one['seconds_reference']:.1f} s released in fp32, {one['seconds']:.2f} s ours "
                f"({one['preset']}, {one['engine']}): {one['ratio']:.1f} times as fast", err=True,
            )  # fmt: skip
            if file is not None:
                file.write_text(json.dumps({**result, "rates": rates}, indent=1) + "\n")
        click.echo(table(result, rates))
    if plot is not None:
        save_plot(result, plot)


if __name__ == "__main__":
    main()
