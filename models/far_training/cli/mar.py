"""The command `far train mar`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from far_training.cli.far import open_latents, pop_sheet_settings
from far_training.cli.loop_options import loop_options, threads_option
from far_training.cli.options import POSITIVE, shared
from far_training.cli.recipes import MAR_PRESETS, preset_option
from far_training.cli.settings_options import pop_settings, settings_options
from far_training.loop.settings import LoopSettings
from far_training.systems.settings import MARLossSettings


@click.command("mar")
@preset_option(MAR_PRESETS)
@shared("latents", "vae", "size", "init")
@click.option("--model", type=click.Choice(["mar_base", "mar_large", "mar_huge"]), help="Sizes of an official model.")
@shared("width", "depth", "heads", "buffer", "head_width", "head_depth", "classes", "latent_scale", "prediction")
@settings_options(MARLossSettings())
@click.option("--sheet-iterations", type=POSITIVE, help="Iterations on sample sheets; default: the sampler's.")
@shared("sheet_steps", "sheet_guidance")
@loop_options()
@threads_option
def mar_command(
    settings: LoopSettings,
    data: Path,
    vae_file: Path,
    size: int,
    init: Path | None,
    model: str | None,
    sheet_iterations: int | None,
    **values: Any,
) -> None:
    """Train MAR on latents.

    RUN/mar.safetensors is what the exporter reads.
    """
    from far_models.checkpoint.save import load_initial_weights
    from far_models.mar import PRESETS
    from far_runtime.model_info import MarInfo
    from far_runtime.sampling.mar import resolve_settings
    from far_training.loop.trainer import train as run_loop
    from far_training.sampling import sheet_reporter
    from far_training.systems.batches import continuous_config
    from far_training.systems.mar import mar_task

    sampling, loss = pop_sheet_settings(values), pop_settings(MARLossSettings, values)
    if sheet_iterations:
        sampling["iterations"] = sheet_iterations
    latents, vae = open_latents(data, vae_file, size, values["latent_scale"])
    values["classes"] = values["classes"] or len(latents.names)
    config = continuous_config(PRESETS[model or "mar_base"], latents, values)
    info = MarInfo(grid=config.grid, channels=config.channels, image_size=size, prediction=config.prediction)
    resolve_settings(info, sampling)
    report = sheet_reporter("mar", vae, **sampling)
    task = mar_task(config, loss, latents, settings.batch, settings.seed, report, sampling)
    load_initial_weights(task.model, init)
    run_loop(task, settings, click.echo)
