"""The command `far train far`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from far_training.cli.loop_options import loop_options, threads_option
from far_training.cli.options import SHARE, pop_settings, say, shared
from far_training.cli.recipes import FAR_PRESETS, preset_option


@click.command("far")
@preset_option(FAR_PRESETS)
@shared("latents", "vae", "size", "init")
@click.option("--model", type=click.Choice(["far_base", "far_large", "far_huge"]), help="Sizes of an official model.")
@shared("width", "depth", "heads", "buffer", "head_width", "head_depth", "classes", "latent_scale", "prediction")
@shared("simplify")
@click.option(
    "--first",
    type=click.Choice(["latents", "mean"]),
    default="latents",
    show_default=True,
    help="What level 0 learns to draw: latents, as the other levels, or their mean, for --shared-noise 1; from cached "
    "latents.",
)
@shared("weight_levels")
@click.option(
    "--mask",
    type=click.Choice(["off", "paper", "code"]),
    default="off",
    show_default=True,
    help="Frequency-aware mask: the paper's or the released code's direction.",
)
@click.option(
    "--filter",
    type=click.Choice(["spatial", "fourier"]),
    default="spatial",
    show_default=True,
    help="Low-pass filter: the paper's (a), which the released models use, or (b).",
)
@click.option(
    "--levels",
    type=click.Choice(["batch", "sample"]),
    default="batch",
    show_default=True,
    help="One level per batch, or per sample.",
)
@shared("low")
@click.option(
    "--first-share",
    type=SHARE,
    default=0.0,
    show_default=True,
    help="Share of samples that learn level 0, beside those that it is drawn for.",
)
@shared("label_drop", "input_noise", "draws", "flip", "flip_until", "dropout", "learned_variance")
@shared("sheet_steps", "sheet_guidance")
@loop_options()
@threads_option
def far_command(
    settings: Any,
    data: Path,
    vae_file: Path,
    size: int,
    init: Path | None,
    model: str | None,
    levels: str,
    sheet_steps: str,
    sheet_guidance: float,
    **values: Any,
) -> None:
    """Train FAR on latents; RUN/far.safetensors is what the exporter reads."""
    from dataclasses import replace

    from far_models.checkpoint.save import begin_with
    from far_models.far import PRESETS
    from far_runtime.errors import FarError
    from far_training.data.latents import NOTES
    from far_training.loop.trainer import train as run_loop
    from far_training.sampling import sheet_reporter
    from far_training.systems.batches import continuous_config
    from far_training.systems.far import FARLossSettings, far_task

    check_sheet_steps(sheet_steps)
    loss_settings = replace(pop_settings(FARLossSettings, values), per_sample=levels == "sample")
    if loss_settings.first == "mean" and data.is_dir() and not (data / NOTES).is_file():
        raise FarError(
            f"{data}: --first mean takes many pictures' latents for one sample; cache them: far train cache-latents"
        )
    latents, vae = open_latents(data, vae_file, size, values["latent_scale"])
    values["classes"] = values["classes"] or len(latents.names)
    config = continuous_config(PRESETS[model or "far_base"], latents, {**values, "masked": loss_settings.mask != "off"})
    sampling: dict[str, Any] = {"steps": sheet_steps, "guidance": sheet_guidance}
    if loss_settings.first == "mean":
        sampling["shared_noise"] = 1
    report = sheet_reporter("far", vae, **sampling)
    task = far_task(config, loss_settings, latents, settings.batch, settings.seed, report, sampling)
    begin_with(task.model, init)
    run_loop(task, settings, say)


def check_sheet_steps(steps: str) -> None:
    """FarError unless --sheet-steps is a number of diffusion steps, several or a rule like 50:5."""
    from far_runtime.sampling.schedule import parse_steps

    parse_steps(steps, steps.count(",") + 1 if "," in steps else 2 if ":" in steps else 1)


def open_latents(data: Path, vae_file: Path, size: int, scale: float | None = None) -> tuple[Any, Any]:
    """Cached latents, or those of pictures that are encoded at every step; and their KL-VAE."""
    from far_models.checkpoint.load import load_checkpoint
    from far_models.pictures import open_pictures
    from far_training.data.latents import NOTES, encoded_set, open_cache
    from far_training.loop.processes import together

    vae = load_checkpoint(vae_file, expect="klvae").model
    if (data / NOTES).is_file():
        return open_cache(data, vae_file), vae
    vae.to(together().device)
    return encoded_set(vae, open_pictures(data, size), scale), vae
