"""The commands `far train vae` and `far train vqvae`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from far_training.cli.loop_options import loop_options, threads_option
from far_training.cli.options import AMOUNT, FILE, FOLDER, POSITIVE, SHARE, pop_settings, say, shared, whole_numbers

LOOP: dict[str, Any] = {
    "lr": 1.2e-3,
    "schedule": "cosine",
    "ema": 0.995,
    "weight_decay": 0.0,
    "beta2": 0.99,
    "clip": 1.0,
}


@click.command("vae")
@shared("pictures", "extra", "extra_share", "size", "ch", "multipliers", "blocks", "channels", "patch")
@shared("square", "gradient")
@click.option("--kl", type=AMOUNT, default=2e-4, show_default=True, help="Weight of the KL divergence per latent cell.")
@click.option(
    "--lowpass", type=SHARE, default=0.25, show_default=True, help="Part of the batches that decode low-passed latents."
)
@click.option(
    "--latent-noise",
    type=AMOUNT,
    default=0.0,
    show_default=True,
    help="Most noise on the latents before decoding, in standard deviations.",
)
@click.option(
    "--redrawn", type=FOLDER, help="Latents that FAR drew of the pictures of --data (far train redraw-latents)."
)
@click.option(
    "--redrawn-share", type=SHARE, default=0.5, show_default=True, help="Part of --data's pictures decoded from these."
)
@click.option(
    "--adversarial",
    type=AMOUNT,
    default=0.0,
    show_default=True,
    help="Weight against a patch discriminator, as a part of the reconstruction's gradient; 0: none.",
)
@click.option(
    "--adversarial-from", type=SHARE, default=0.05, show_default=True, help="Part of the run before it counts."
)
@click.option("--discriminator-width", type=click.IntRange(8), default=64, show_default=True)
@click.option("--init", type=FILE, help="Start from the weights of this KL-VAE (its sizes count).")
@click.option("--freeze-encoder", is_flag=True, help="Train the decoder alone, so that the latents stay the same.")
@loop_options(**LOOP)
@threads_option
def vae_command(
    settings: Any,
    data: Path,
    extra: Path | None,
    extra_share: float,
    size: int,
    multipliers: str,
    redrawn: Path | None,
    redrawn_share: float,
    **values: Any,
) -> None:
    """Train a KL-VAE; RUN/vae.safetensors is what FAR, MAR and the exporter read."""
    from far_models.checkpoint.load import load_checkpoint
    from far_models.kl_vae import VAEConfig
    from far_training.loop.trainer import train as run_loop
    from far_training.systems.discriminator import AdversarialSettings
    from far_training.systems.vae import Redrawn, VAELossSettings, vae_task

    loss_settings, against = pop_settings(VAELossSettings, values), pop_settings(AdversarialSettings, values)
    freeze_encoder, init = values.pop("freeze_encoder"), values.pop("init")
    start = load_checkpoint(init, expect="klvae").model if init else None
    widths = whole_numbers(multipliers, "--multipliers")
    config = start.config if start else VAEConfig(multipliers=widths, **values)
    sets, shares = picture_sets(data, extra, extra_share, size)
    anew = Redrawn(redrawn, redrawn_share) if redrawn else None
    task = vae_task(
        config, loss_settings, sets, shares, settings.batch, settings.seed, start, freeze_encoder, against, anew
    )
    run_loop(task, settings, say)


@click.command("vqvae")
@shared("pictures", "extra", "extra_share", "size", "ch", "multipliers", "blocks", "channels", "patch")
@click.option("--vocabulary", type=click.IntRange(2), default=4096, show_default=True, help="Codes of the codebook.")
@click.option("--phis", type=POSITIVE, default=4, show_default=True, help="Convolutions that the scales share.")
@click.option("--scales", help="Sides of the token maps, as 1,2,3,4,8; default: the official ones, up to the latents'.")
@shared("square", "gradient")
@click.option(
    "--quantization", type=AMOUNT, default=1.0, show_default=True, help="Weight of codebook and commitment loss."
)
@click.option(
    "--restart",
    type=click.IntRange(0),
    default=50,
    show_default=True,
    help="Steps between which codes out of use get a new place; 0: they never do.",
)
@click.option(
    "--restart-until", type=SHARE, default=0.6, show_default=True, help="Share of the run after which none do."
)
@loop_options(**LOOP)
@threads_option
def vqvae_command(
    settings: Any,
    data: Path,
    extra: Path | None,
    extra_share: float,
    size: int,
    multipliers: str,
    scales: str | None,
    **values: Any,
) -> None:
    """Train VAR's VQ-VAE; RUN/vqvae.safetensors is what VAR and the exporter read."""
    from far_models.vq_vae import VQVAEConfig
    from far_training.loop.trainer import train as run_loop
    from far_training.systems.vae import grid_of_pictures
    from far_training.systems.vqvae import VQVAELossSettings, default_scales, vqvae_task

    loss_settings = pop_settings(VQVAELossSettings, values)
    sizes = VQVAEConfig(multipliers=whole_numbers(multipliers, "--multipliers"), **values)
    sets, shares = picture_sets(data, extra, extra_share, size)
    sides = whole_numbers(scales, "--scales") if scales else default_scales(grid_of_pictures(sets, sizes.stride))
    if list(sides) != sorted(set(sides)):
        raise click.BadParameter(f"{scales}; expected rising numbers, as in 1,2,4,8", param_hint="--scales")
    config = VQVAEConfig(multipliers=sizes.multipliers, patch_nums=sides, **values)
    task = vqvae_task(config, loss_settings, sets, shares, settings.batch, settings.seed)
    run_loop(task, settings, say)


def picture_sets(data: Path, extra: Path | None, extra_share: float, size: int) -> tuple[list[Any], list[float]]:
    """The picture folders of the options, and their parts of each batch."""
    from far_models.pictures import open_pictures

    sets = [open_pictures(path, size) for path in (data, extra) if path is not None]
    return sets, [1 - extra_share, extra_share][: len(sets)]
