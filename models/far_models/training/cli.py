"""The commands `far train vae`, `far train cache-latents` and `far train far`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from far_models.training.options import FILE, FOLDER, POSITIVE, SHARE, loop_options, threads_option


@click.group()
def train() -> None:
    """Train a KL-VAE and FAR on pictures."""


@train.command("vae")
@click.option(
    "--data", type=FOLDER, required=True, help="Picture folder: images.npy and labels.npy, or a subfolder per class."
)
@click.option("--extra", type=FOLDER, help="A second picture folder that is mixed in.")
@click.option("--extra-share", type=SHARE, default=0.25, show_default=True, help="Part of each batch from --extra.")
@click.option(
    "--size", type=POSITIVE, default=64, show_default=True, help="Side in pixels to which image folders are resized."
)
@click.option("--ch", type=POSITIVE, default=32, show_default=True, help="Channels of the first resolution.")
@click.option("--multipliers", default="1,2,4", show_default=True, help="Channels of each resolution in units of --ch.")
@click.option("--blocks", type=POSITIVE, default=1, show_default=True, help="Residual blocks per resolution.")
@click.option("--channels", type=POSITIVE, default=16, show_default=True, help="Channels of the latents.")
@click.option(
    "--patch", type=POSITIVE, default=2, show_default=True, help="Pixels folded into channels first, per side."
)
@click.option(
    "--square", type=click.FloatRange(0), default=1.0, show_default=True, help="Weight of the mean squared error."
)
@click.option(
    "--gradient",
    type=click.FloatRange(0),
    default=0.5,
    show_default=True,
    help="Weight of the L1 of pixel differences.",
)
@click.option(
    "--kl",
    type=click.FloatRange(0),
    default=2e-4,
    show_default=True,
    help="Weight of the KL divergence per latent cell.",
)
@click.option(
    "--lowpass", type=SHARE, default=0.25, show_default=True, help="Part of the batches that decode low-passed latents."
)
@click.option(
    "--latent-noise",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Most noise on the latents before decoding, in standard deviations.",
)
@click.option("--init", type=FILE, help="Start from the weights of this KL-VAE (its sizes count).")
@click.option("--freeze-encoder", is_flag=True, help="Train the decoder alone, so that the latents stay the same.")
@loop_options(lr=1.2e-3, schedule="cosine", ema=0.995, weight_decay=0.0, beta2=0.99, clip=1.0)
@threads_option
def vae_command(
    settings: Any, data: Path, extra: Path | None, extra_share: float, size: int, multipliers: str, **values: Any
) -> None:
    """Train a KL-VAE; RUN/vae.safetensors is what FAR and the exporter read."""
    from far_models.checkpoint import load_checkpoint
    from far_models.kl_vae import VAEConfig
    from far_models.training.data import open_pictures
    from far_models.training.loop import train as run_loop
    from far_models.training.vae import VAELossSettings, vae_task

    loss_settings = VAELossSettings(
        *(values.pop(name) for name in ("square", "gradient", "kl", "lowpass", "latent_noise"))
    )
    freeze_encoder, init = values.pop("freeze_encoder"), values.pop("init")
    start = load_checkpoint(init, expect="klvae").model if init else None
    config = start.config if start else VAEConfig(multipliers=parse_multipliers(multipliers), **values)
    sets = [open_pictures(path, size) for path in (data, extra) if path is not None]
    shares = [1 - extra_share, extra_share][: len(sets)]
    task = vae_task(config, loss_settings, sets, shares, settings.batch, settings.seed, start, freeze_encoder)
    run_loop(task, settings, say)


def parse_multipliers(text: str) -> tuple[int, ...]:
    """Multipliers from "1,2,4"; a click error for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(
            f"{text!r}; expected whole numbers with commas between, as in 1,2,4", param_hint="--multipliers"
        )
    return tuple(int(part) for part in parts)


@train.command("cache-latents")
@click.option(
    "--data", type=FOLDER, required=True, help="Picture folder: images.npy and labels.npy, or a subfolder per class."
)
@click.option("--vae", "vae_file", type=FILE, required=True, help="KL-VAE checkpoint.")
@click.option("-o", "--out", type=FOLDER, required=True, help="Folder to write.")
@click.option(
    "--size", type=POSITIVE, default=64, show_default=True, help="Side in pixels to which image folders are resized."
)
@click.option("--batch", type=POSITIVE, default=32, show_default=True)
@threads_option
def cache_latents_command(data: Path, vae_file: Path, out: Path, size: int, batch: int) -> None:
    """Encode all pictures and their mirror images once, so that FAR trains without the VAE."""
    from far_models.checkpoint import load_checkpoint
    from far_models.training.data import open_pictures
    from far_models.training.latents import write_cache

    vae = load_checkpoint(vae_file, expect="klvae").model
    scale = write_cache(vae, vae_file, open_pictures(data, size), out, batch, say)
    say(f"wrote {out}; latent scale {scale:.4f}")


@train.command("far")
@click.option("--data", type=FOLDER, required=True, help="Cached latents, or pictures that are encoded at every step.")
@click.option(
    "--vae", "vae_file", type=FILE, required=True, help="KL-VAE checkpoint, for the latents and the sample sheets."
)
@click.option(
    "--size", type=POSITIVE, default=64, show_default=True, help="Side in pixels to which image folders are resized."
)
@click.option("--model", type=click.Choice(["far_base", "far_large", "far_huge"]), help="Start from a preset's sizes.")
@click.option("--width", type=POSITIVE, help="Width of encoder and decoder.")
@click.option("--depth", type=POSITIVE, help="Blocks of the encoder, and of the decoder.")
@click.option("--heads", type=POSITIVE, help="Attention heads.")
@click.option("--buffer", type=click.IntRange(0), help="Buffer tokens that carry the class.")
@click.option("--head-width", type=POSITIVE, help="Width of the diffusion head.")
@click.option("--head-depth", type=POSITIVE, help="Blocks of the diffusion head.")
@click.option("--classes", type=POSITIVE, help="Classes; default: the data's.")
@click.option(
    "--latent-scale",
    type=click.FloatRange(0, min_open=True),
    help="Factor of the latents; default: 1 / their deviation.",
)
@click.option("--prediction", type=click.Choice(["epsilon", "v"]), default="epsilon", show_default=True)
@click.option(
    "--simplify/--no-simplify",
    default=True,
    show_default=True,
    help="Target: the full latents, or those of the next level.",
)
@click.option(
    "--level-weight/--no-level-weight",
    "weight_levels",
    default=True,
    show_default=True,
    help="Frequency-aware loss weight.",
)
@click.option(
    "--mask",
    type=click.Choice(["off", "paper", "code"]),
    default="off",
    show_default=True,
    help="Frequency-aware mask: the paper's or the released code's direction.",
)
@click.option(
    "--levels",
    type=click.Choice(["batch", "sample"]),
    default="batch",
    show_default=True,
    help="One level per batch, or per sample.",
)
@click.option(
    "--low",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="How much more often low levels are drawn than high ones.",
)
@click.option("--label-drop", type=SHARE, default=0.1, show_default=True)
@click.option(
    "--input-noise",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Deviation of the noise on the input latents, times |n| per sample.",
)
@click.option(
    "--draws", type=POSITIVE, default=4, show_default=True, help="Noise draws per token (diffusion_batch_mul)."
)
@click.option("--flip", type=SHARE, default=0.5, show_default=True, help="Share of mirrored samples.")
@click.option(
    "--flip-until", type=SHARE, default=1.0, show_default=True, help="Share of the run after which none are mirrored."
)
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True)
@click.option(
    "--learned-variance/--fixed-variance",
    default=True,
    show_default=True,
    help="With or without the variational bound.",
)
@click.option("--sheet-steps", default="25", show_default=True, help="Diffusion steps per level on sample sheets.")
@click.option("--sheet-guidance", type=click.FloatRange(0), default=2.0, show_default=True)
@loop_options()
@threads_option
def far_command(
    settings: Any,
    data: Path,
    vae_file: Path,
    size: int,
    levels: str,
    sheet_steps: str,
    sheet_guidance: float,
    **values: Any,
) -> None:
    """Train FAR on latents; RUN/checkpoint-last.pth is an ordinary checkpoint for `far export`."""
    from far_models.checkpoint import load_checkpoint
    from far_models.training.far import FARLossSettings, far_task
    from far_models.training.latents import encoded_set, open_cache
    from far_models.training.loop import train as run_loop
    from far_models.training.sampling import sheet_reporter
    from far_runtime.schedule import parse_steps

    parse_steps(sheet_steps, 1 if sheet_steps.isdigit() else sheet_steps.count(",") + 1)
    techniques = [
        "simplify",
        "weight_levels",
        "mask",
        "low",
        "label_drop",
        "input_noise",
        "draws",
        "flip",
        "flip_until",
        "dropout",
        "learned_variance",
    ]
    loss_settings = FARLossSettings(per_sample=levels == "sample", **{name: values.pop(name) for name in techniques})
    vae = load_checkpoint(vae_file, expect="klvae").model
    cached = (data / "latents.json").is_file()
    latents = (
        open_cache(data, vae_file) if cached else encoded_set(vae, open_pictures_of(data, size), values["latent_scale"])
    )
    config = model_config(latents, masked=loss_settings.mask != "off", **values)
    reporter = sheet_reporter("far", vae, steps=sheet_steps, guidance=sheet_guidance)
    task = far_task(config, loss_settings, latents, settings.batch, settings.seed, reporter)
    run_loop(task, settings, say)


def open_pictures_of(data: Path, size: int) -> Any:
    """Pictures of a folder (imported late)."""
    from far_models.training.data import open_pictures

    return open_pictures(data, size)


def model_config(
    latents: Any,
    masked: bool,
    prediction: str,
    model: str | None,
    classes: int | None,
    latent_scale: float | None,
    width: int | None,
    depth: int | None,
    heads: int | None,
    **others: int | None,
) -> Any:
    """FARConfig of a preset (or of FAR-B) with the given sizes changed, fitted to the latents."""
    from dataclasses import replace

    from far_models.far import PRESETS
    from far_runtime.errors import FarError

    changes = {
        f"{part}_{name}": value
        for name, value in (("width", width), ("depth", depth), ("heads", heads))
        for part in ("encoder", "decoder")
    }
    given = {name: value for name, value in {**changes, **others}.items() if value is not None}
    config = replace(
        PRESETS[model or "far_base"],
        grid=latents.grid,
        channels=latents.channels,
        classes=classes or len(latents.names),
        latent_scale=latent_scale or latents.scale,
        masked=masked,
        prediction=prediction,
        **given,
    )
    if config.encoder_width % config.encoder_heads:
        raise FarError(
            f"--heads {config.encoder_heads} does not divide the width {config.encoder_width}; "
            "choose another --heads or --width"
        )
    return config


def say(line: str) -> None:
    """Print one line at once, so that logs of background runs are never behind."""
    click.echo(line)
