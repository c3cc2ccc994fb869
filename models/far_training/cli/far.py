"""The command `far train far`, and what it shares with the other trainers on latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_runtime.errors import FarError
from far_training.cli.loop_options import loop_options, threads_option
from far_training.cli.options import shared
from far_training.cli.recipes import FAR_PRESETS, preset_option
from far_training.cli.settings_options import pop_settings, settings_options
from far_training.loop.settings import LoopSettings
from far_training.systems.settings import FARLossSettings

if TYPE_CHECKING:
    from far_models.kl_vae import AutoencoderKL
    from far_training.data.latents import LatentSet


@click.command("far")
@preset_option(FAR_PRESETS)
@shared("latents", "vae", "size", "init")
@click.option("--model", type=click.Choice(["far_base", "far_large", "far_huge"]), help="Sizes of an official model.")
@shared("width", "depth", "heads", "buffer", "head_width", "head_depth", "classes", "latent_scale", "prediction")
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
    help="Whether one level is drawn per batch, or one per sample.",
)
@settings_options(FARLossSettings())
@shared("sheet_steps", "sheet_guidance")
@loop_options()
@threads_option
def far_command(
    settings: LoopSettings,
    data: Path,
    vae_file: Path,
    size: int,
    init: Path | None,
    model: str | None,
    levels: str,
    **values: Any,
) -> None:
    """Train FAR on latents.

    RUN/far.safetensors is what the exporter reads.
    """
    from far_models.checkpoint.save import load_initial_weights
    from far_models.far import PRESETS
    from far_training.loop.trainer import train as run_loop
    from far_training.sampling import sheet_reporter
    from far_training.systems.batches import continuous_config
    from far_training.systems.far import far_task

    sampling = pop_sheet_settings(values)
    loss = replace(pop_settings(FARLossSettings, values), per_sample=levels == "sample")
    if loss.first == "mean":
        check_cached(data)
        sampling["shared_noise"] = 1
    latents, vae = open_latents(data, vae_file, size, values["latent_scale"])
    values["classes"] = values["classes"] or len(latents.names)
    config = continuous_config(PRESETS[model or "far_base"], latents, {**values, "masked": loss.mask != "off"})
    report = sheet_reporter("far", vae, **sampling)
    task = far_task(config, loss, latents, settings.batch, settings.seed, report, sampling)
    load_initial_weights(task.model, init)
    run_loop(task, settings, click.echo)


def check_cached(data: Path) -> None:
    """FarError for pictures whose latents are not cached, of which a sample would take too many."""
    from far_training.data.latents import NOTES

    if data.is_dir() and not (data / NOTES).is_file():
        raise FarError(
            f"{data}: --first mean takes many pictures' latents for one sample; cache them: far train cache-latents"
        )


def pop_sheet_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The sampler's settings for sample sheets, whose options are taken out of `values`.

    FarError unless --sheet-steps is a number of diffusion steps, several or a rule like 50:5.
    """
    from far_runtime.sampling.schedule import parse_steps

    steps = values.pop("sheet_steps")
    parse_steps(steps, steps.count(",") + 1 if "," in steps else 2 if ":" in steps else 1)
    return {"steps": steps, "guidance": values.pop("sheet_guidance")}


def open_latents(data: Path, vae_file: Path, size: int, scale: float | None = None) -> tuple[LatentSet, AutoencoderKL]:
    """Cached latents, or those of pictures that are encoded at every step; and their KL-VAE."""
    from far_models.checkpoint.load import load_checkpoint
    from far_models.pictures import open_pictures
    from far_training.data.latents import NOTES, encoded_set, open_cache
    from far_training.loop.processes import process_group

    vae = load_checkpoint(vae_file, expect="klvae").model
    if (data / NOTES).is_file():
        return open_cache(data, vae_file), vae
    vae.to(process_group().device)
    return encoded_set(vae, open_pictures(data, size), scale), vae
