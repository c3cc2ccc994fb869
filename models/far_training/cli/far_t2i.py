"""The command `far train far-t2i`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from far_training.cli.far import open_latents, pop_sheet_settings
from far_training.cli.loop_options import loop_options, threads_option
from far_training.cli.options import FOLDER, shared
from far_training.cli.recipes import T2I_PRESETS, preset_option
from far_training.cli.settings_options import pop_settings, settings_options
from far_training.loop.settings import LoopSettings
from far_training.systems.settings import FART2ILossSettings


@click.command("far-t2i")
@preset_option(T2I_PRESETS)
@shared("latents")
@click.option(
    "--text", type=FOLDER, required=True, help="Features of the prompts of the same pictures (far train cache-text)."
)
@shared("vae", "size", "init")
@shared("width", "depth", "heads", "head_width", "head_depth", "latent_scale", "prediction")
@settings_options(FART2ILossSettings())
@shared("sheet_steps", "sheet_guidance")
@loop_options()
@threads_option
def far_t2i_command(
    settings: LoopSettings, data: Path, text: Path, vae_file: Path, size: int, init: Path | None, **values: Any
) -> None:
    """Train FAR-T2I on latents and prompts.

    RUN/far_t2i.safetensors is what the exporter reads.
    """
    from far_models.checkpoint.save import load_initial_weights
    from far_models.far_t2i import FART2IConfig
    from far_training.data.prompts import open_text_cache
    from far_training.loop.trainer import train as run_loop
    from far_training.sampling import prompt_reporter
    from far_training.systems.batches import continuous_config
    from far_training.systems.far_t2i import far_t2i_task

    sampling, loss = pop_sheet_settings(values), pop_settings(FART2ILossSettings, values)
    latents, vae = open_latents(data, vae_file, size, values["latent_scale"])
    prompts = open_text_cache(text, latents.labels)
    _, tokens, width = prompts.features.shape
    config = continuous_config(FART2IConfig(context_tokens=tokens, context_width=width), latents, values)
    report = prompt_reporter(vae, prompts, latents.labels, **sampling)
    task = far_t2i_task(config, loss, latents, prompts, settings.batch, settings.seed, report, sampling)
    load_initial_weights(task.model, init)
    run_loop(task, settings, click.echo)
