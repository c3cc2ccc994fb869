"""The command `far train var`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from far_runtime.errors import FarError
from far_training.cli.far import open_latents
from far_training.cli.loop_options import loop_options, threads_option
from far_training.cli.options import FACTOR, FILE, SHARE, pop_settings, say, shared, whole_numbers
from far_training.cli.recipes import VAR_PRESETS, preset_option


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
    help="Each scale adds to the coarser ones; without, it is the shrunk latents themselves (continuous tokens only).",
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
@shared("width", "depth", "heads", "classes")
@shared("head_width", "head_depth", "latent_scale", "prediction", "draws", "input_noise", "learned_variance")
@shared("label_drop")
@click.option("--smoothing", type=SHARE, default=0.0, show_default=True, help="Of the targets (discrete tokens).")
@click.option("--drop-path", type=SHARE, help="Rate of dropped branches at the last block; default: 0.1 depth / 24.")
@click.option(
    "--gain",
    type=FACTOR,
    default=1e-5,
    show_default=True,
    help="Scale of the blocks' branches at the start (discrete tokens).",
)
@shared("flip", "flip_until", "sheet_steps", "sheet_guidance")
@click.option("--sheet-top-k", type=click.IntRange(0), help="Codes to choose from on sample sheets; 0: all.")
@click.option("--sheet-top-p", type=SHARE, help="Share of the probability that they have to cover; 0: all.")
@loop_options(weight_decay=0.05, clip=2.0)
@threads_option
def var_command(settings: Any, tokens: str, residual: bool, **values: Any) -> None:
    """Train VAR on a VQ-VAE's tokens; RUN/var.safetensors is what the exporter reads.

    With --tokens continuous it trains a hybrid, which draws sample sheets but is not exported.
    """
    if tokens == "discrete":
        if not residual:
            raise FarError("--no-residual: a VQ-VAE codes residuals; use --tokens continuous with it")
        refuse(values, tokens, "scales", "head_width", "head_depth", "latent_scale")
        train_var(settings, **values)
    else:
        refuse(values, tokens, "sheet_top_k", "sheet_top_p", "init")
        del values["init"]
        train_hybrid(settings, residual, **values)


def refuse(values: dict[str, Any], tokens: str, *names: str) -> None:
    """FarError where an option is given that means nothing for such tokens."""
    for name in names:
        if values[name] is not None:
            raise FarError(f"--{name.replace('_', '-')}: has no meaning with --tokens {tokens}; leave it out")


def train_var(
    settings: Any, data: Path, vae_file: Path, size: int, model: str | None, init: Path | None, **values: Any
) -> None:
    """VAR on discrete tokens."""
    from far_models.checkpoint.load import load_checkpoint
    from far_models.checkpoint.save import begin_with
    from far_models.pictures import open_pictures
    from far_models.var import VARConfig
    from far_training.data.tokens import NOTES, coded_set, open_token_cache
    from far_training.loop.processes import together
    from far_training.loop.trainer import train as run_loop
    from far_training.sampling import sheet_reporter
    from far_training.systems.var import VARLossSettings, var_task

    vqvae = load_checkpoint(vae_file, expect="vqvae").model
    cached = (data / NOTES).is_file()
    if cached:
        found = open_token_cache(data, vae_file, vqvae)
    else:
        found = coded_set(vqvae.to(together().device), open_pictures(data, size))
    sizes = transformer_sizes(model, found, values)
    of_vae = vqvae.config
    config = VARConfig(
        patch_nums=of_vae.patch_nums,
        channels=of_vae.channels,
        vocabulary=of_vae.vocabulary,
        shared_aln=model == "var_d36",
        **sizes,
    )
    guidance = values["sheet_guidance"]
    chosen = {"top_k": values["sheet_top_k"], "top_p": values["sheet_top_p"]}
    sampling = {"guidance": guidance, **{name: value for name, value in chosen.items() if value is not None}}
    report = sheet_reporter("var", vqvae, **sampling)
    loss_settings = pop_settings(VARLossSettings, values)
    task = var_task(config, loss_settings, found, vqvae, settings.batch, settings.seed, report, sampling)
    begin_with(task.model, init)
    run_loop(task, settings, say)


def train_hybrid(
    settings: Any, residual: bool, data: Path, vae_file: Path, size: int, model: str | None, **values: Any
) -> None:
    """A hybrid on continuous tokens."""
    from far_models.var_hybrid import VARHybridConfig
    from far_training.loop.trainer import train as run_loop
    from far_training.sampling import sheet_reporter
    from far_training.systems.var_hybrid import VARHybridLossSettings, var_hybrid_task
    from far_training.systems.vqvae import default_scales

    latents, vae = open_latents(data, vae_file, size, values["latent_scale"])
    scales = whole_numbers(values["scales"], "--scales") if values["scales"] else default_scales(latents.grid)
    sizes = transformer_sizes(model, latents, values)
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
    loss_settings = pop_settings(VARHybridLossSettings, values)
    task = var_hybrid_task(config, loss_settings, latents, settings.batch, settings.seed, report)
    run_loop(task, settings, say)


def transformer_sizes(model: str | None, data: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Width, depth, heads and classes from the options, a preset (default: var_d16) and the data; sets the default of
    --drop-path too."""
    from far_training.systems.batches import check_heads

    depth = values["depth"] or int((model or "var_d16").removeprefix("var_d"))
    width = values["width"] or 64 * depth
    heads = values["heads"] or max(width // 64, 1)
    check_heads(width, heads)
    if values["drop_path"] is None:
        values["drop_path"] = 0.1 * depth / 24
    return {"width": width, "depth": depth, "heads": heads, "classes": values["classes"] or len(data.names)}
