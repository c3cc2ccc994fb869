"""The command `far train var`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from far_runtime.errors import FarError
from far_training.cli.far import open_latents
from far_training.cli.loop_options import loop_options, threads_option
from far_training.cli.options import FILE, SHARE, shared, whole_numbers
from far_training.cli.recipes import VAR_PRESETS, preset_option
from far_training.cli.settings_options import pop_settings, settings_options
from far_training.loop.settings import LoopSettings
from far_training.systems.settings import VARHybridLossSettings, VARLossSettings


@click.command("var")
@preset_option(VAR_PRESETS)
@click.option(
    "--tokens",
    type=click.Choice(["discrete", "continuous"]),
    default="discrete",
    show_default=True,
    help="A VQ-VAE's codes (VAR), or a KL-VAE's latents and a diffusion head (the hybrids of FAR's article).",
)
@click.option(
    "--residual/--no-residual",
    default=True,
    show_default=True,
    help="Whether each scale adds to the coarser ones, or is the shrunk latents themselves (continuous tokens only).",
)
@shared("latents")
@click.option("--vae", "vae_file", type=FILE, required=True, help="VQ-VAE checkpoint; KL-VAE for continuous tokens.")
@shared("size", "init")
@click.option("--scales", help="Continuous tokens: sides of the maps, as 1,2,4,8; default: the official ones.")
@click.option(
    "--model",
    type=click.Choice(["var_d16", "var_d20", "var_d24", "var_d30", "var_d36"]),
    help="Sizes of an official model.",
)
@shared("width", "depth", "heads", "classes", "head_width", "head_depth", "latent_scale", "prediction")
@settings_options(VARLossSettings(), VARHybridLossSettings(), drop_path=None)
@shared("sheet_steps", "sheet_guidance")
@click.option("--sheet-top-k", type=click.IntRange(0), help="Codes to choose from on sample sheets; 0: all.")
@click.option(
    "--sheet-top-p", type=SHARE, help="Probability that the codes to choose from on sample sheets cover; 0: all codes."
)
@loop_options(LoopSettings(weight_decay=0.05, clip=2.0))
@threads_option
def var_command(settings: LoopSettings, tokens: str, residual: bool, **values: Any) -> None:
    """Train VAR on a VQ-VAE's tokens.

    RUN/var.safetensors is what the exporter reads. With --tokens continuous the command trains a hybrid, which draws
    sample sheets but is not exported.
    """
    if tokens == "discrete":
        if not residual:
            raise FarError("--no-residual: a VQ-VAE codes residuals; use --tokens continuous with it")
        check_absent(values, tokens, "scales", "head_width", "head_depth", "latent_scale")
        train_var(settings, **values)
    else:
        check_absent(values, tokens, "sheet_top_k", "sheet_top_p", "init")
        train_hybrid(settings, residual, **values)


def check_absent(values: dict[str, Any], tokens: str, *names: str) -> None:
    """FarError where an option has a value that means nothing for such tokens."""
    for name in names:
        if values[name] is not None:
            raise FarError(f"--{name.replace('_', '-')}: has no meaning with --tokens {tokens}; leave it out")


def train_var(
    settings: LoopSettings, data: Path, vae_file: Path, size: int, model: str | None, init: Path | None, **values: Any
) -> None:
    """Train VAR on discrete tokens."""
    from far_models.checkpoint.load import load_checkpoint
    from far_models.checkpoint.save import load_initial_weights
    from far_models.pictures import open_pictures
    from far_models.var import VARConfig
    from far_training.data.tokens import NOTES, coded_set, open_token_cache
    from far_training.loop.processes import process_group
    from far_training.loop.trainer import train as run_loop
    from far_training.sampling import sheet_reporter
    from far_training.systems.var import var_task

    vqvae = load_checkpoint(vae_file, expect="vqvae").model
    if (data / NOTES).is_file():
        tokens = open_token_cache(data, vae_file, vqvae)
    else:
        tokens = coded_set(vqvae.to(process_group().device), open_pictures(data, size))
    sizes = transformer_sizes(model, len(tokens.names), values)
    config = VARConfig(
        patch_nums=vqvae.config.patch_nums,
        channels=vqvae.config.channels,
        vocabulary=vqvae.config.vocabulary,
        shared_aln=model == "var_d36",
        **sizes,
    )
    chosen = {"top_k": values["sheet_top_k"], "top_p": values["sheet_top_p"]}
    sampling = {"guidance": values["sheet_guidance"]}
    sampling |= {name: value for name, value in chosen.items() if value is not None}
    report = sheet_reporter("var", vqvae, **sampling)
    loss = pop_settings(VARLossSettings, values)
    task = var_task(config, loss, tokens, vqvae, settings.batch, settings.seed, report, sampling)
    load_initial_weights(task.model, init)
    run_loop(task, settings, click.echo)


def train_hybrid(
    settings: LoopSettings, residual: bool, data: Path, vae_file: Path, size: int, model: str | None, **values: Any
) -> None:
    """Train a hybrid on continuous tokens."""
    from far_models.var_hybrid import VARHybridConfig
    from far_training.loop.trainer import train as run_loop
    from far_training.sampling import sheet_reporter
    from far_training.systems.var_hybrid import var_hybrid_task
    from far_training.systems.vqvae import default_scales

    latents, vae = open_latents(data, vae_file, size, values["latent_scale"])
    scales = whole_numbers(values["scales"], "--scales") if values["scales"] else default_scales(latents.grid)
    sizes = transformer_sizes(model, len(latents.names), values)
    head = {name: values[name] for name in ("head_width", "head_depth") if values[name] is not None}
    config = VARHybridConfig(
        patch_nums=scales,
        channels=latents.channels,
        residual=residual,
        prediction=values["prediction"],
        latent_scale=values["latent_scale"] or latents.scale,
        **sizes,
        **head,
    )
    steps = values["sheet_steps"]
    if not steps.isdecimal() or int(steps) < 1:
        raise FarError(f"--sheet-steps {steps}: expected one number of diffusion steps for all scales of a hybrid")
    report = sheet_reporter("var_hybrid", vae, steps=int(steps), guidance=values["sheet_guidance"])
    loss = pop_settings(VARHybridLossSettings, values)
    task = var_hybrid_task(config, loss, latents, settings.batch, settings.seed, report)
    run_loop(task, settings, click.echo)


def transformer_sizes(model: str | None, classes: int, values: dict[str, Any]) -> dict[str, Any]:
    """Width, depth, heads and classes by the options, an official model (default: var_d16) and the data's classes.

    It also sets the default of --drop-path, which depends on the depth.
    """
    from far_training.systems.batches import check_heads

    depth = values["depth"] or int((model or "var_d16").removeprefix("var_d"))
    width = values["width"] or 64 * depth
    heads = values["heads"] or max(width // 64, 1)
    check_heads(width, heads)
    if values["drop_path"] is None:
        values["drop_path"] = 0.1 * depth / 24
    return {"width": width, "depth": depth, "heads": heads, "classes": values["classes"] or classes}
