"""Writes a zoo folder from finished runs: weights as float16 .safetensors, figures, and a card of measured numbers.

    python scripts/zoo/model_card.py --vae-run runs/vae --vae-run runs/decoder --run runs/far --data data/emoji \
        --recipe scripts/zoo/train_far_emoji.sh -o models/zoo/far-emoji

--run: of FAR, FAR-T2I (with --text-encoder), MAR or VAR. Several --vae-run or --run: the last one's weights count, the
others are told of. --vae: the model draws through a VAE that is in the zoo already. --renew: the folder has a card
already, whose runs are told of first; the runs that are given went on from its weights, and weights that none of them
trained stay as they are (--weak and --note are to be given again). Needs the extras `train`, `export` and `evaluate`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from torch import nn

from card_figures import distance_figures, drawing, drawn_samples, prompts_for, reconstruction_figures, sample_figures
from card_runs import TITLES, Run, open_run, run_table, runs_of_card
from emoji_sources import EMOJIBASE, STYLES, Package
from far_export.cli.demo import PROMPTS
from far_export.stages import SYSTEMS
from far_models.checkpoint.load import load_checkpoint
from far_models.checkpoint.save import export_checkpoint
from far_models.checkpoint.settings import parse_overrides
from far_models.pictures import PictureSet, open_pictures
from far_runtime.cli.option_names import with_options
from far_runtime.errors import FarError
from far_training.loop.state import STATE
from far_training.sheets import draw_curves

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
LIMIT = 30_000_000
VAE_FILES = {"klvae": "vae.safetensors", "vqvae": "vqvae.safetensors"}


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


def number_lines(numbers: Mapping[str, Any], train: int) -> list[str]:
    """What was measured, as a list."""
    lines = [f"- Reconstruction by the VAE: {numbers['psnr_train']:.1f} dB PSNR on the {train} training pictures."]
    if "psnr_held_out" in numbers:
        lines.append(
            f"- The same on {numbers['held_out']} pictures held out of all training: {numbers['psnr_held_out']:.1f} dB."
        )
    ratio = numbers["frechet_samples"] / numbers["frechet_reconstructions"]
    lines += [
        f"- Frechet distance to the training pictures (48 principal components of efficientnet-lite0's features; no "
        f"Inception FID): {numbers['samples']} samples {numbers['frechet_samples']:.1f}, the training pictures' "
        f"reconstructions {numbers['frechet_reconstructions']:.1f}, ratio {ratio:.2f}.",
        f"- Of {numbers['samples']} samples, {100 * numbers['same_class']:.0f} % have their nearest training picture "
        "(pixel distance, mirror images included) in the concept that was asked for.",
        f"- Distance of a sample to its nearest training picture: median {numbers['distance']:.1f} of 255 (root mean "
        f"square), smallest {numbers['closest']:.1f}; a training picture lies {numbers['apart']:.1f} (median) from the "
        "nearest other one.",
    ]
    return lines


def weak_lines(numbers: Mapping[str, Any], classes: int, weak: tuple[str, ...]) -> list[str]:
    """What the model is bad at: by measure, and as seen."""
    missed = numbers["missed"]
    which = f" ({', '.join(missed)})" if missed else ""
    return [
        f"- {len(missed)} of {classes} concepts have no sample whose nearest training picture is one of theirs{which}.",
        *(f"- {line}" for line in weak),
    ]


@dataclass(frozen=True)
class Card:
    """All that the card is made of. vae_from: the zoo folder that holds the VAE, if it is another's."""

    name: str
    system: str
    model: nn.Module
    vae: nn.Module
    vae_from: str
    data: PictureSet
    runs: dict[str, Run]
    numbers: dict[str, Any]
    settings: str
    weak: tuple[str, ...]
    notes: tuple[str, ...]
    recipe: Path

    def text(self) -> str:
        """The text of README.md."""
        title, data = TITLES[self.system], self.data
        vae_title = "VQ-VAE" if self.system == "var" else "KL-VAE"
        own, of_vae = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (self.model, self.vae))
        where = f" (of [{self.vae_from}](../{self.vae_from}/README.md))" if self.vae_from else ""
        asked = f" (prompts: [{PROMPTS}]({PROMPTS}))" if self.system == "far_t2i" else ""
        blocks = [
            f"# {self.name}",
            f"A {title} of {own:.2f} M parameters and its {vae_title} of {of_vae:.2f} M{where} that draw {data.size} x "
            f"{data.size} emoji of {len(data.names)} concepts, trained on two CPU cores. A demonstration of the "
            "pipeline: small data, short training, no more than that.",
            "![one sample of each class](samples.webp)",
            f"One sample of each concept{asked}, seeds 0 to {len(data.names) - 1}, {self.settings}. Concepts in order: "
            f"{', '.join(data.names)}.",
            "## Numbers",
            "\n".join(number_lines(self.numbers, len(data.train))),
            "![reconstructions](reconstructions.webp)",
            "Training pictures, each with its reconstruction to the right.",
            "![nearest training pictures](nearest.webp)",
            "Samples, each with its nearest training picture to the right. With so few pictures per concept the model "
            "stays close to what it has seen.",
            "## What it is bad at",
            "\n".join(weak_lines(self.numbers, len(data.names), self.weak)),
            "## Data and licences",
            f"{len(data.train)} pictures of {len(data.names)} concepts, made by scripts/zoo/prepare_emoji.py:",
            "\n".join(licence_lines(data)),
            "The weights are derived from these drawings; credit their authors when you publish pictures.",
            "## Recipe",
            "```bash\n" + self.recipe.read_text(encoding="utf-8").strip() + "\n```",
            "\n".join(run_table(self.runs)),
            "Hours are those of the training steps, by the clock, on a machine that had other work to do as well.",
            *self.notes,
            *(f"![loss curves of {name}]({curves_of(i)})" for i, name in enumerate(self.runs)),
            "## Sizes",
            f"{title}: `{json.dumps(vars(self.model.config))}`",
            f"{vae_title}: `{json.dumps(vars(self.vae.config))}`",
            "Figures and numbers of this card: scripts/zoo/model_card.py.",
        ]
        return "\n\n".join(blocks) + "\n"


def curves_of(place: int) -> str:
    """The picture with the loss curves of a run."""
    return f"curves-{place + 1}.png"


def store(run: Run, out: Path, name: str, data: PictureSet, sampling: Mapping[str, Any]) -> nn.Module:
    """Write a run's averaged weights in float16; the model as it reads from there, which is what is measured."""
    model = load_checkpoint(run.folder / STATE, "model_ema", expect=run.system).model
    summary = {
        "steps": run.steps,
        "minutes": round(run.minutes, 1),
        "loss": round(run.mean("loss"), 5),
        "data": data.source.name,
    }
    names = data.names if run.system in ("far", "mar", "var") else ()
    export_checkpoint(model, out / name, names, summary, sampling=sampling)
    return load_checkpoint(out / name, expect=run.system).model


def stored_model(run: Run | None, out: Path, system: str, data: PictureSet, sampling: Mapping[str, Any]) -> nn.Module:
    """The model of the run, written to the folder, or the one that is there."""
    name = f"{system}.safetensors"
    if run is None:
        return load_checkpoint(out / name, expect=system).model
    return store(run, out, name, data, sampling)


def stored_vae(
    vae_runs: tuple[Path, ...], vae_file: Path | None, kind: str, out: Path, data: PictureSet, renew: bool
) -> nn.Module:
    """The VAE of the last run, written to the folder, or one that lies elsewhere or is there."""
    if vae_file is None and not vae_runs and renew:
        vae_file = out / VAE_FILES[kind]
    if bool(vae_runs) == bool(vae_file):
        raise FarError("give either --vae-run, a run whose VAE is written, or --vae, a file that is there already")
    if vae_file:
        return load_checkpoint(vae_file, expect=kind).model
    return store(open_run(vae_runs[-1]), out, VAE_FILES[kind], data, {})


@click.command(help=__doc__)
@click.option("--vae-run", type=FOLDER, multiple=True, help="Folder of a VAE's run; the last one's weights count.")
@click.option("--vae", "vae_file", type=FILE, help="A VAE of another zoo folder.")
@click.option(
    "--run", "model_runs", type=FOLDER, multiple=True, help="Folder of the model's run; the last one's weights count."
)
@click.option("--renew", is_flag=True, help="The folder has a card already: its runs are told of first.")
@click.option("--text-encoder", type=FOLDER, help="Hugging Face folder of the text encoder, for FAR-T2I.")
@click.option("--data", type=FOLDER, required=True, help="Folder of training pictures.")
@click.option("--extra", type=FOLDER, help="Folder whose held-out pictures measure the VAE.")
@click.option("--recipe", type=FILE, required=True, help="Script that trained it.")
@click.option(
    "--settings",
    default="steps=10 guidance=2",
    show_default=True,
    help="How samples are drawn, and what a bundle takes as its default: NAME=VALUE, separated by spaces.",
)
@click.option(
    "--per-class", type=click.IntRange(1), default=4, show_default=True, help="Samples per class for the numbers."
)
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine that draws.")
@click.option("--weak", multiple=True, help="Something that it is bad at.")
@click.option("--note", multiple=True, help="A remark on how the runs went.")
@click.option("-o", "--out", type=click.Path(path_type=Path, file_okay=False), required=True)
def main(**options: Any) -> None:
    try:
        build(**options)
    except FarError as error:
        click.echo(f"error: {with_options(error)}", err=True)
        sys.exit(2)


def build(
    vae_run: tuple[Path, ...], vae_file: Path | None, model_runs: tuple[Path, ...], renew: bool,
    text_encoder: Path | None, data: Path, extra: Path | None, recipe: Path, settings: str, per_class: int,
    threads: int | None, weak: tuple[str, ...], note: tuple[str, ...], out: Path,
) -> None:  # fmt: skip
    """Do what the command says; the weights that are measured are the float16 ones that are written."""
    earlier = runs_of_card(out / "README.md") if renew else {}
    opened, pictures = [open_run(folder) for folder in model_runs], open_pictures(data)
    run = opened[-1] if opened else None
    if len(systems := {one.system for one in opened}) > 1:
        raise FarError(f"--run: runs of {' and '.join(sorted(systems))}; a card tells of one model")
    given = [*map(open_run, vae_run), *opened]
    new = {f"{TITLES[one.system]} ({one.folder.name})": one for one in given}
    if len(new) < len(given):
        raise FarError("two runs of one system lie in folders of the same name; rename one of them")
    if both := earlier.keys() & new.keys():
        raise FarError(f"{', '.join(both)}: the card has a run of this name; rename the folder of the new one")
    runs = earlier | new
    system = run.system if run else next((r.system for r in earlier.values() if r.system in SYSTEMS), None)
    if system is None:
        raise FarError("there is no run to tell of; give --run, or --renew for a folder that has a card")
    if system == "far_t2i" and text_encoder is None:
        raise FarError("a FAR-T2I draws from prompts; give its text encoder: --text-encoder")
    sampling = parse_overrides(tuple(settings.split()), "--settings")
    if run and run.args.get("loss_first") == "mean" and not sampling.get("shared_noise"):
        raise FarError(f'{run.folder} was trained with --first mean; give --settings "{settings} shared_noise=1"')
    out.mkdir(parents=True, exist_ok=True)
    kind, name = SYSTEMS[system].vae, f"{system}.safetensors"
    if run is None and (kept := dict(load_checkpoint(out / name, expect=system).sampling)) != sampling:
        told = " ".join(f"{key}={value}" for key, value in kept.items())
        raise FarError(f'{out / name} stays as it is, and draws by other settings; give --settings "{told}"')
    vae = stored_vae(vae_run, vae_file, kind, out, pictures, renew)
    model = stored_model(run, out, system, pictures, sampling)
    if text_encoder:  # for far demo
        classes = range(len(pictures.names))
        (out / PROMPTS).write_text("\n".join(prompts_for(pictures, classes, classes)) + "\n", encoding="utf-8")
    with drawing(out / name, vae_file or out / VAE_FILES[kind], text_encoder, pictures, threads) as draw:
        samples = drawn_samples(draw, pictures, per_class)
    numbers: dict[str, Any] = reconstruction_figures(vae, pictures, open_pictures(extra) if extra else None, out)
    numbers |= sample_figures(samples, pictures, out) | distance_figures(samples, vae, pictures)
    for place, title in enumerate(runs):
        if title in new:
            draw_curves(new[title].records, out / curves_of(place))
    vae_from = os.path.basename(vae_file.parent) if vae_file else ""
    card = Card(out.name, system, model, vae, vae_from, pictures, runs, numbers, settings, weak, note, recipe)
    (out / "README.md").write_text(card.text(), encoding="utf-8")
    size = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    click.echo(json.dumps(numbers))
    click.echo(f"{out}: {size / 1e6:.1f} MB; {shutil.disk_usage(out).free / 1e9:.0f} GB free")
    if size > LIMIT:
        raise FarError(f"{out}: {size / 1e6:.1f} MB; expected less than {LIMIT / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
