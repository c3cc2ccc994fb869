"""Writes a zoo folder from finished runs: weights as float16 .safetensors, figures, and a card of measured numbers.

    python scripts/model_card.py --vae-run runs/vae --vae-run runs/decoder --far-run runs/far --data data/emoji \
        --recipe scripts/train_far_emoji.sh -o models/zoo/far-emoji

Needs the `train` and `export` extras. Several --vae-run: the last one's weights count, the others are told of.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from emoji_sources import EMOJIBASE, STYLES, Package
from far_models.checkpoint import load_checkpoint
from far_models.far import FAR
from far_models.kl_vae import AutoencoderKL
from far_models.training.data import PictureSet, open_pictures
from far_models.training.metrics import METRICS, read_metrics
from far_models.training.sampling import sample_pictures
from far_models.training.sheets import draw_curves, save_picture, tile
from far_models.training.state import STATE
from far_models.training.vae import comparison, evenly, reconstruction_psnr
from far_models.training.zoo import export_checkpoint
from far_runtime.errors import FarError

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
LIMIT = 30_000_000


@dataclass(frozen=True)
class Run:
    """A finished run: its arguments, its records, and the number of its steps and minutes."""

    folder: Path
    args: dict[str, Any]
    records: list[dict[str, float]]
    steps: int
    minutes: float

    def mean(self, name: str, last: int = 10) -> float:
        """Mean of the last records of a value."""
        values = [record[name] for record in self.records if name in record]
        return float(np.mean(values[-last:]))


def open_run(folder: Path) -> Run:
    """Read a run's state and metrics; FarError if there is none."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FarError(f"{folder / STATE}: no such file; give the folder of a finished run") from error
    return Run(folder, vars(state["args"]), read_metrics(folder / METRICS), state["step"], state["elapsed"] / 60)


def nearest(
    pictures: NDArray[np.uint8], pool: NDArray[np.uint8], skip_self: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each picture [N, S, S, 3] the nearest of `pool` [M, S, S, 3]: its index and its distance, both [N].

    The distance is the root mean square difference of pixel values (0 to 255), of the picture or its mirror image.
    `skip_self`: picture i is pool[i], which does not count.
    """
    flat = pool.reshape(len(pool), -1).astype(np.float32)
    mirrored = pool[:, :, ::-1].reshape(len(pool), -1).astype(np.float32)
    indices, distances = [], []
    for i, picture in enumerate(pictures.reshape(len(pictures), -1).astype(np.float32)):
        error = np.minimum(((flat - picture) ** 2).mean(1), ((mirrored - picture) ** 2).mean(1))
        if skip_self:
            error[i] = np.inf
        indices.append(int(error.argmin()))
        distances.append(float(np.sqrt(error.min())))
    return np.array(indices), np.array(distances)


def sample_figures(
    far: FAR, vae: AutoencoderKL, data: PictureSet, out: Path, steps: str, guidance: float, per_class: int
) -> dict[str, float]:
    """Write samples.png (one of each class) and nearest.png; numbers over `per_class` samples of each class."""
    classes = len(data.names)
    labels = [label for _ in range(per_class) for label in range(classes)]
    pictures = sample_pictures("far", far, vae, labels, list(range(len(labels))), steps=steps, guidance=guidance)
    save_picture(tile(pictures[:classes], 16), out / "samples.png")
    pool = data.read(data.train)
    found, distance = nearest(pictures, pool)
    _, apart = nearest(pool, pool, skip_self=True)
    chosen = np.linspace(0, classes - 1, 32).round().astype(int)
    pairs = np.stack([pictures[chosen], pool[found[chosen]]], axis=1)
    save_picture(tile(pairs.reshape(-1, *pairs.shape[2:]), 16), out / "nearest.png")
    same = data.labels[data.train][found] == np.array(labels)
    return {
        "samples": len(labels),
        "same_class": float(same.mean()),
        "distance": float(np.median(distance)),
        "closest": float(distance.min()),
        "apart": float(np.median(apart)),
    }


def reconstruction_figures(
    vae: AutoencoderKL, data: PictureSet, others: PictureSet | None, out: Path
) -> dict[str, float]:
    """Write reconstructions.png; mean PSNR in dB of training and held-out pictures."""
    save_picture(comparison(vae, data, evenly(data.train, 32)), out / "reconstructions.png")
    numbers = {"psnr_train": reconstruction_psnr(vae, data, data.train)}
    held = others if others is not None and len(others.held_out) else data
    if len(held.held_out):
        numbers |= {"psnr_held_out": reconstruction_psnr(vae, held, held.held_out), "held_out": len(held.held_out)}
    return numbers


def licence_lines(data: PictureSet) -> list[str]:
    """One line per drawing style with its package, licence and credit, and how many training pictures are its own."""
    styles = np.load(data.source / "styles.npy", allow_pickle=False)[data.train]
    packages: list[Package] = list(STYLES.values())
    rows = [
        f"| {name} | {package.name} {package.version} | {package.licence} | {package.credit} | "
        f"{int((styles == i).sum())} |"
        for i, (name, package) in enumerate(zip(STYLES, packages, strict=True))
        if (styles == i).any()
    ]
    head = ["| style | package | licence | credit | training pictures |", "| --- | --- | --- | --- | --- |"]
    last = f"Labels: {EMOJIBASE.name} {EMOJIBASE.version}, {EMOJIBASE.licence}, {EMOJIBASE.credit}."
    return [*head, *rows, "", last]


def run_table(runs: dict[str, Run]) -> list[str]:
    """Recipe and result of each run."""
    keys = ("batch", "lr", "warmup", "schedule", "weight_decay", "beta2", "clip", "ema", "seed")
    lines = ["| | " + " | ".join(runs) + " |", "| --- |" + " --- |" * len(runs)]
    lines += [f"| {key} | " + " | ".join(str(run.args[key]) for run in runs.values()) + " |" for key in keys]
    lines.append("| steps | " + " | ".join(str(run.steps) for run in runs.values()) + " |")
    lines.append("| training minutes | " + " | ".join(f"{run.minutes:.1f}" for run in runs.values()) + " |")
    lines.append("| loss at the end | " + " | ".join(f"{run.mean('loss'):.4f}" for run in runs.values()) + " |")
    settings = sorted({key for run in runs.values() for key in run.args if key.startswith("loss_")})
    for key in settings:
        lines.append(f"| {key[5:]} | " + " | ".join(str(run.args.get(key, "")) for run in runs.values()) + " |")
    return lines


def card(
    name: str,
    far: FAR,
    vae: AutoencoderKL,
    data: PictureSet,
    runs: dict[str, Run],
    numbers: dict[str, Any],
    recipe: Path,
) -> str:
    """The text of README.md."""
    count = {part: sum(p.numel() for p in model.parameters()) / 1e6 for part, model in (("far", far), ("vae", vae))}
    blocks = [
        f"# {name}",
        f"A FAR of {count['far']:.2f} M parameters and its KL-VAE of {count['vae']:.2f} M that draw {data.size} x "
        f"{data.size} emoji of {len(data.names)} concepts, trained on two CPU cores. A demonstration of the pipeline: "
        "small data, short training, no more than that.",
        "![one sample of each class](samples.png)",
        f"One sample of each concept, seeds 0 to {len(data.names) - 1}, guidance {numbers['guidance']:g} (rising), "
        f"{numbers['steps']} DDPM steps at each of {far.config.grid} levels. Concepts in order: "
        f"{', '.join(data.names)}.",
        "## Numbers",
        "\n".join(number_lines(numbers, len(data.train))),
        "![reconstructions](reconstructions.png)",
        "Training pictures, each with its reconstruction to the right.",
        "![nearest training pictures](nearest.png)",
        "Samples, each with its nearest training picture to the right. With so few pictures per concept the model "
        "stays close to what it has seen.",
        "## Data and licences",
        f"{len(data.train)} pictures of {len(data.names)} concepts, made by scripts/prepare_emoji.py:",
        "\n".join(licence_lines(data)),
        "The weights are derived from these drawings; credit their authors when you publish pictures.",
        "## Recipe",
        "```bash\n" + recipe.read_text(encoding="utf-8").strip() + "\n```",
        "\n".join(run_table(runs)),
        "Minutes are those of the training steps, by the clock, on a machine that had other work to do as well.",
        *numbers["notes"],
        "![loss curves of FAR](far-curves.png)",
        "![loss curves of the VAE](vae-curves.png)",
        "## Sizes",
        f"FAR: `{json.dumps(vars(far.config))}`",
        f"KL-VAE: `{json.dumps(vars(vae.config))}`",
        "Figures and numbers of this card: scripts/model_card.py.",
    ]
    return "\n\n".join(blocks) + "\n"


def number_lines(numbers: dict[str, Any], train: int) -> list[str]:
    """What was measured, as a list."""
    lines = [f"- Reconstruction by the VAE: {numbers['psnr_train']:.1f} dB PSNR on the {train} training pictures."]
    if "psnr_held_out" in numbers:
        lines.append(
            f"- The same on {numbers['held_out']} pictures held out of all training: {numbers['psnr_held_out']:.1f} dB."
        )
    lines += [
        f"- Of {numbers['samples']} samples, {100 * numbers['same_class']:.0f} % have their nearest training picture "
        "(pixel distance, mirror images included) in the concept that was asked for.",
        f"- Distance of a sample to its nearest training picture: median {numbers['distance']:.1f} of 255 (root mean "
        f"square), smallest {numbers['closest']:.1f}; a training picture lies {numbers['apart']:.1f} (median) from the "
        "nearest other one.",
    ]
    return lines


@click.command()
@click.option(
    "--vae-run", type=FOLDER, multiple=True, required=True, help="Folder of a KL-VAE run; the last one's weights count."
)
@click.option("--far-run", type=FOLDER, required=True, help="Folder of a FAR run.")
@click.option("--data", type=FOLDER, required=True, help="Folder of training pictures.")
@click.option("--extra", type=FOLDER, help="Folder whose held-out pictures measure the VAE.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="Script that trained it.",
)
@click.option("--steps", default="10", show_default=True, help="Diffusion steps per level.")
@click.option("--guidance", type=click.FloatRange(0), default=2.0, show_default=True)
@click.option(
    "--per-class", type=click.IntRange(1), default=2, show_default=True, help="Samples per class for the numbers."
)
@click.option("--note", multiple=True, help="A remark on how the runs went.")
@click.option("-o", "--out", type=click.Path(path_type=Path, file_okay=False), required=True)
def main(
    vae_run: tuple[Path, ...], far_run: Path, data: Path, extra: Path | None, recipe: Path, steps: str, guidance: float,
    per_class: int, note: tuple[str, ...], out: Path,
) -> None:  # fmt: skip
    """Write weights, figures and card of a trained pair."""
    try:
        build(vae_run, far_run, data, extra, recipe, steps, guidance, per_class, note, out)
    except FarError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


def build(
    vae_run: tuple[Path, ...], far_run: Path, data: Path, extra: Path | None, recipe: Path, steps: str, guidance: float,
    per_class: int, note: tuple[str, ...], out: Path,
) -> None:  # fmt: skip
    """Do what the command says; the weights that are measured are the float16 ones that are written."""
    pictures = open_pictures(data)
    runs = {f"KL-VAE {i + 1} ({folder.name})": open_run(folder) for i, folder in enumerate(vae_run)}
    runs["FAR"] = open_run(far_run)
    out.mkdir(parents=True, exist_ok=True)
    for kind, name, folder in (("klvae", "vae", vae_run[-1]), ("far", "far", far_run)):
        run = open_run(folder)
        model = load_checkpoint(folder / STATE, "model_ema", expect=kind).model
        summary = {
            "steps": run.steps,
            "minutes": round(run.minutes, 1),
            "loss": round(run.mean("loss"), 5),
            "data": data.name,
        }
        names, sampling = (pictures.names, {"steps": steps, "guidance": guidance}) if kind == "far" else ((), {})
        export_checkpoint(model, out / f"{name}.safetensors", names, summary, sampling=sampling)
    vae = load_checkpoint(out / "vae.safetensors", expect="klvae").model
    far = load_checkpoint(out / "far.safetensors", expect="far").model
    assert isinstance(vae, AutoencoderKL) and isinstance(far, FAR)
    numbers: dict[str, Any] = {"steps": steps, "guidance": guidance, "notes": list(note)}
    numbers |= reconstruction_figures(vae, pictures, open_pictures(extra) if extra else None, out)
    numbers |= sample_figures(far, vae, pictures, out, steps, guidance, per_class)
    draw_curves(runs["FAR"].records, out / "far-curves.png")
    draw_curves(next(iter(runs.values())).records, out / "vae-curves.png")
    (out / "README.md").write_text(card(out.name, far, vae, pictures, runs, numbers, recipe), encoding="utf-8")
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    click.echo(json.dumps(numbers))
    click.echo(f"{out}: {size / 1e6:.1f} MB; {shutil.disk_usage(out).free / 1e9:.0f} GB free")
    if size > LIMIT:
        raise FarError(f"{out}: {size / 1e6:.1f} MB; expected less than {LIMIT / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
