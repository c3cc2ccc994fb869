"""Ablations of FAR: small runs that differ in one option each, with several seeds, and a table of results.

    python scripts/zoo/ablate.py --data data/emoji64 --latents runs/latents64 --vae runs/vae/vae.safetensors \
        --runs runs/ablation -o docs/ablations.md

Every run is `far train far` with one option changed. Its result is the Frechet distance of its samples to the training
pictures, over the 48 leading principal components of the training pictures' efficientnet-lite0 features; smaller is
better. Differences are taken seed by seed, which removes the effect of the seed. Finished runs are used again, and
interrupted ones are resumed. Needs the extras `train`, `export` and `evaluate`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from far_runtime.cli.option_names import with_options
from far_runtime.errors import FarError
from far_runtime.storage.atomic import whole_file

FOLDER = click.Path(path_type=Path, file_okay=False)
FIGURES = "figures.json"
SIZES = (
    "--width 128 --depth 3 --heads 4 --buffer 8 --head-width 192 --head-depth 3 --prediction v --dropout 0 --draws 2 "
    "--batch 32 --lr 1.5e-3 --warmup 60 --schedule cosine --clip 1 --ema 0.99"
)
BASE = "base"
SAMPLING = {"steps": "10", "guidance": 2.0}


@dataclass(frozen=True)
class Variant:
    """One change of the base run."""

    title: str
    """What is different."""

    options: str
    """Options of far train far."""

    claim: str
    """What the paper or the code claims about the change, or ""."""


TRAINED = {
    BASE: Variant("FAR as in the paper, unmasked, one level a batch", "", ""),
    "plain": Variant(
        "target: the next level's latents",
        "--no-simplify",
        "paper: predicting the full latents at every level (simplification) is better",
    ),
    "unweighted": Variant(
        "no loss weight by level", "--no-level-weight", "paper: more weight on high levels is better"
    ),
    "mask-paper": Variant(
        "mask, share falling with the level (paper)",
        "--mask paper",
        "paper: masking makes the model better; in an unmasked schedule it is not used",
    ),
    "mask-code": Variant(
        "mask, share rising with the level (released code)", "--mask code", "the released code's direction"
    ),
    "fourier": Variant("filter (b), Fourier", "--filter fourier", "paper: filter (a) by default, (b) works as well"),
    "per-sample": Variant("one level a sample", "--levels sample", "released T2I code; not compared in the paper"),
    "low": Variant("low levels drawn twice as often", "--low 1", "of our recipe"),
    "noise": Variant("noise 0.3 on the input latents", "--input-noise 0.3", "of our recipe"),
    "epsilon": Variant("epsilon prediction", "--prediction epsilon", "official; of our recipe: v"),
}
"""The trained runs by name."""

DRAWN: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"levels-{count}": (
            f"{count} of 8 levels",
            {"levels": [int(level) for level in np.linspace(0, 7, count).round()]},
        )
        for count in (4, 5, 6, 7)
    },
    **{f"steps-{steps}": (f"{steps} diffusion steps", {"steps": str(steps)}) for steps in (3, 5, 25, 50)},
    "rising": ("5 rising to 15 diffusion steps", {"steps": "5:15"}),
    "falling": ("15 falling to 5 diffusion steps", {"steps": "15:5"}),
}
"""Changes in sampling from the base runs: title and sampling settings by name."""


@dataclass(frozen=True)
class Ablation:
    """What all runs share."""

    data: Path
    """Folder of training pictures."""

    latents: Path
    """Folder of their cached latents."""

    vae: Path

    runs: Path
    """Folder for the runs."""

    steps: int
    """Training steps of a run."""

    count: int
    """Samples per measured distance."""


def folder_of(ablation: Ablation, name: str, seed: int) -> Path:
    """Folder of a run."""
    return ablation.runs / f"{name}-{seed}"


def train(ablation: Ablation, name: str, seed: int) -> None:
    """Train a run to its end, resuming it if it was interrupted; FarError where it fails."""
    folder = folder_of(ablation, name, seed)
    command = [sys.executable, "-m", "far_training", "far", "-o", str(folder), "--data", str(ablation.latents)]
    command += ["--vae", str(ablation.vae), "--steps", str(ablation.steps), "--seed", str(seed), "--threads", "1"]
    command += ["--amp", "auto", "--sheet-minutes", "1000", *SIZES.split(), *TRAINED[name].options.split()]
    if (folder / "checkpoint-last.pth").exists():
        command.append("--resume")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise FarError(f"{folder}: the run failed: {result.stderr.strip().splitlines()[-1]}")


def measure(ablation: Ablation, name: str, seed: int) -> dict[str, float]:
    """Distances of a run's samples by the name of the change in sampling ("": none); only the base run has changes."""
    import torch

    from card_figures import drawing
    from far_export.evaluate.features import extract_features, load_efficientnet
    from far_export.evaluate.metrics import frechet_from_features, principal_components
    from far_models.pictures import open_pictures

    torch.set_num_threads(1)
    pictures, network = open_pictures(ablation.data), load_efficientnet()
    wanted = extract_features(network, pictures.read(pictures.train))
    basis = principal_components(wanted)
    labels = [i % len(pictures.names) for i in range(ablation.count)]
    seeds = [100_000 * (seed + 1) + i for i in range(ablation.count)]
    with drawing(folder_of(ablation, name, seed) / "far.safetensors", ablation.vae, None, pictures, threads=1) as draw:

        def distance(settings: Mapping[str, Any]) -> float:
            drawn = draw(labels, seeds, **{**SAMPLING, **settings})
            return frechet_from_features(extract_features(network, drawn) @ basis, wanted @ basis)

        changes = DRAWN if name == BASE else {}
        return {"": distance({}), **{key: distance(settings) for key, (_, settings) in changes.items()}}


def figures_of(ablation: Ablation, name: str, seed: int) -> dict[str, float] | None:
    """The distances of a run that was measured with these steps and samples; None otherwise."""
    try:
        found = json.loads((folder_of(ablation, name, seed) / FIGURES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    same = found["steps"] == ablation.steps and found["count"] == ablation.count
    return dict(found["figures"]) if same else None


def job(ablation: Ablation, name: str, seed: int) -> str:
    """Train and measure one run, unless that is done; returns a line to print."""
    figures = figures_of(ablation, name, seed)
    if figures is None:
        if not (folder_of(ablation, name, seed) / "far.safetensors").exists():
            train(ablation, name, seed)
        figures = measure(ablation, name, seed)
        with whole_file(folder_of(ablation, name, seed) / FIGURES) as aside:
            aside.write_text(json.dumps({"steps": ablation.steps, "count": ablation.count, "figures": figures}))
    return f"{name} seed {seed}: {figures['']:.1f}"


def found_figures(ablation: Ablation, seeds: Sequence[int]) -> dict[str, dict[int, float]]:
    """Distances of all measured runs, by row (a key of TRAINED or DRAWN) and seed."""
    rows: dict[str, dict[int, float]] = {}
    for name in TRAINED:
        for seed in seeds:
            for key, value in (figures_of(ablation, name, seed) or {}).items():
                rows.setdefault(key or name, {})[seed] = value
    return rows


def verdict(rows: Mapping[str, Mapping[int, float]], name: str) -> tuple[str, str]:
    """Difference to the base over the seeds: "mean ± standard error", and a word for it."""
    shared = sorted(rows[name].keys() & rows.get(BASE, {}).keys())
    differences = np.array([rows[name][seed] - rows[BASE][seed] for seed in shared])
    if name == BASE or len(differences) < 2:
        return "", ""
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(len(differences))
    word = "no difference seen" if abs(mean) < 2 * error else "better" if mean < 0 else "worse"
    return f"{mean:+.1f} ± {error:.1f}", word


def table(rows: Mapping[str, Mapping[int, float]], names: Mapping[str, tuple[str, str]]) -> list[str]:
    """Markdown lines: title, distance as mean ± deviation over the seeds, difference to the base, claim."""
    lines = [
        "| changed | distance | seeds | to the base | seen here | said |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for name, (title, claim) in names.items():
        if name not in rows:
            continue
        values = np.array(list(rows[name].values()))
        spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
        difference, word = verdict(rows, name)
        lines.append(f"| {title} | {values.mean():.1f}{spread} | {len(values)} | {difference} | {word} | {claim} |")
    return lines


def document(ablation: Ablation, rows: Mapping[str, Mapping[int, float]], notes: Sequence[str] = ()) -> str:
    """The text of docs/ablations.md."""
    claims = {
        "levels": "paper: 10 of 16 levels are enough",
        "steps": "paper: 100 steps; FAR's thread: fewer at low levels",
        "rising": "FAR's thread: fewer at low levels than at high ones",
        "falling": "DiSA for MAR: fewer at the end",
    }
    trained = {name: (variant.title, variant.claim) for name, variant in TRAINED.items()}
    drawn = {name: (title, claims[name.partition("-")[0]]) for name, (title, _) in DRAWN.items()}
    first = {BASE: ("8 levels, 10 DDPM steps at each", "")}
    blocks = [
        "# Ablations",
        "What each technique of FAR does on far-emoji at a small budget: runs of "
        f"{ablation.steps} steps that differ from the base in one thing, several seeds each. Made by "
        "`scripts/zoo/ablate.py`; its --help says what the distance is. Smaller is better.",
        f"The base: `far train far {SIZES}`, one level a batch, level weights, no mask, simplification, filter (a); "
        f"{ablation.count} samples, guidance 2, 10 DDPM steps at each of 8 levels.",
        "*To the base* is the mean difference over seeds with its standard error; *seen here* says better or worse "
        "where the difference is at least twice that error. With this few seeds and steps that is a hint, no proof.",
        *notes,
        "## Training",
        "\n".join(table(rows, trained)),
        "## Drawing",
        "The base runs, drawn in other ways:",
        "\n".join(table(rows, first | drawn)),
    ]
    return "\n\n".join(blocks) + "\n"


@click.command(help=__doc__)
@click.option(
    "--data", type=FOLDER, required=True, help="Training pictures, as scripts/zoo/prepare_emoji.py writes them."
)
@click.option("--latents", type=FOLDER, required=True, help="Their cached latents.")
@click.option("--vae", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The VAE.")
@click.option("--runs", type=FOLDER, required=True, help="Folder for the runs.")
@click.option("--steps", type=click.IntRange(1), default=1200, show_default=True, help="Training steps of a run.")
@click.option("--count", type=click.IntRange(96), default=512, show_default=True, help="Samples per measured distance.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Number of seeds, from 0.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(TRAINED)),
    help="Only these runs and the base; may be repeated. Default: all.",
)
@click.option(
    "--jobs", type=click.IntRange(1), default=2, show_default=True, help="Runs at a time, with one thread each."
)
@click.option("--note", multiple=True, help="A remark for the document; may be repeated.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for the document. Default: print it only.",
)
def main(
    data: Path, latents: Path, vae: Path, runs: Path, steps: int, count: int, seeds: int, only: tuple[str, ...],
    jobs: int, note: tuple[str, ...], out: Path | None,
) -> None:  # fmt: skip
    ablation = Ablation(data, latents, vae, runs, steps, count)
    names = [name for name in TRAINED if not only or name in only or name == BASE]
    try:
        with ProcessPoolExecutor(jobs) as pool:
            # Seed by seed, so that an early look at the table compares whole rows.
            waiting = [pool.submit(job, ablation, name, seed) for seed in range(seeds) for name in names]
            for future in waiting:
                click.echo(future.result())
        text = document(ablation, found_figures(ablation, range(seeds)), note)
        if out:
            with whole_file(out) as aside:
                aside.write_text(text, encoding="utf-8")
        click.echo(text)
    except FarError as error:
        click.echo(f"error: {with_options(error)}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
