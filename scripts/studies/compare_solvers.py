"""Solvers with few diffusion steps compared with the official sampler, by Frechet distances.

    python scripts/studies/compare_solvers.py BUNDLE [--solver ddim,dpmpp-2m] [--steps 3,5,8] [--power own,0,0.5,1]

Two sets by the official sampler (ddpm, 100 steps at every level) with different seeds come first, A and B. Every row
draws A again with other settings and compares it with B; the result is this distance divided by that of A and B, 1
where nothing has changed. The start noise of every level is multiplied by its temperature to the --power; "own" leaves
that to the solver. Features are kept in --kept, so that a second run draws only what is new.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from far_export.evaluate.features import extract_features, load_efficientnet
from far_export.evaluate.metrics import frechet_from_features, principal_components
from far_runtime.conditioning.subjects import Subject, condition_of, spread_subjects
from far_runtime.pipeline import Pipeline
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.reverse_diffusion import diffusion_of
from far_runtime.sampling.settings import plan_of, resolve_settings, sampler_of
from far_runtime.storage.atomic import whole_file
from far_runtime.storage.run_record import digest_of

OFFICIAL = {"solver": "ddpm", "steps": 100}
BATCH = 32


class ScaledNoise(SeedNoise):
    """Noise whose start is multiplied by a factor for every step of the loop."""

    def __init__(self, seeds: Sequence[int], factors: Sequence[float]) -> None:
        super().__init__(seeds)
        self._factors = factors

    def start(self, step: int, tokens: int, channels: int) -> NDArray[np.float32]:
        return super().start(step, tokens, channels) * np.float32(self._factors[step])


class Sets:
    """Features of sets of pictures, each computed once and kept in files."""

    def __init__(self, pipeline: Pipeline, count: int, kept: Path) -> None:
        self._pipeline, self._count, self._kept = pipeline, count, kept
        self._network = load_efficientnet()

    def of(self, first: int, given: Mapping[str, Any], power: str = "own") -> NDArray[np.float64]:
        """Features [count, 1280] of the pictures with the seeds first, first + 1, ..."""
        subjects = spread_subjects(self._pipeline.bundle.manifest, self._count)
        settings = resolve_settings(self._pipeline.bundle.manifest, given)
        batches = range(0, self._count, BATCH)
        return np.concatenate([self._batch(subjects[i : i + BATCH], first + i, settings, power) for i in batches])

    def _batch(
        self, subjects: Sequence[Subject], first: int, settings: Mapping[str, Any], power: str
    ) -> NDArray[np.float64]:
        engine, bundle = self._pipeline.engine, self._pipeline.bundle
        manifest = bundle.manifest
        facts = [manifest.id, engine.name, [one.caption for one in subjects], first, settings, power]
        file = self._kept / f"{digest_of(facts)}.npy"
        if not file.exists():
            plan = plan_of(manifest, settings)
            steps = [diffusion_of(step) for step in plan]
            factors = [
                1.0 if power == "own" else one.temperature ** float(power) / (one.start_scale or 1.0) for one in steps
            ]
            noise = ScaledNoise(range(first, first + len(subjects)), factors)
            condition, _ = condition_of(engine, bundle, subjects)
            latents = sampler_of(manifest).sample(engine, manifest.model, plan, condition, noise)
            found = extract_features(self._network, self._pipeline.decode(engine.get(latents)))
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as aside, aside.open("wb") as opened:
                np.save(opened, found)
        loaded: NDArray[np.float64] = np.load(file)
        return loaded


@click.command(help=__doc__)
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--count", type=int, default=192, show_default=True, help="Pictures of a set.")
@click.option("--engine", default="openvino:cpu:bf16", show_default=True, help="Engine that draws.")
@click.option("--threads", type=int, help="Threads of the engine. Default: its choice.")
@click.option("--solver", "solvers", default="dpmpp-2m", show_default=True, help="Solvers, with commas between them.")
@click.option("--steps", default="3,5,8", show_default=True, help="Diffusion steps, with commas.")
@click.option("--power", "powers", default="own", show_default=True, help="Powers, with commas.")
@click.option("--temperature", type=float, help="Temperature of all sets. Default: the bundle's.")
@click.option(
    "--kept",
    type=click.Path(path_type=Path),
    default=Path("runs/solvers"),
    show_default=True,
    help="Folder for features.",
)
def main(
    path: Path, count: int, engine: str, threads: int | None, solvers: str, steps: str, powers: str,
    temperature: float | None, kept: Path,
) -> None:  # fmt: skip
    given = {"temperature": temperature}
    with Pipeline.from_bundle(path, engine, threads) as pipeline:
        sets = Sets(pipeline, count, kept)
        a, b = (sets.of(first, {**given, **OFFICIAL}) for first in (0, count))
        basis = principal_components(b)
        unit = frechet_from_features(a @ basis, b @ basis)
        click.echo(f"{count} pictures a set, two official sets {unit:.2f} apart\n")
        click.echo("| solver | steps | start noise | ratio | to A, same seeds |\n" + "| --- " * 5 + "|")
        for solver, number, power in itertools.product(solvers.split(","), steps.split(","), powers.split(",")):
            ours = sets.of(0, {**given, "solver": solver, "steps": number}, power) @ basis
            near, paired = frechet_from_features(ours, b @ basis) / unit, frechet_from_features(ours, a @ basis) / unit
            click.echo(f"| {solver} | {number} | {power} | {near:.3f} | {paired:.3f} |")


if __name__ == "__main__":
    main()
