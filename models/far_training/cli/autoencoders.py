"""The commands `far train vae` and `far train vqvae`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from far_training.cli.loop_options import loop_options, threads_option
from far_training.cli.options import FILE, FOLDER, POSITIVE, SHARE, shared, whole_numbers
from far_training.cli.settings_options import pop_settings, settings_options
from far_training.loop.settings import LoopSettings
from far_training.systems.settings import AdversarialSettings, VAELossSettings, VQVAELossSettings

if TYPE_CHECKING:
    from far_training.data.mixture import PictureMixture

LOOP = LoopSettings(lr=1.2e-3, schedule="cosine", ema=0.995, weight_decay=0.0, beta2=0.99, clip=1.0)


@click.command("vae")
@shared("pictures", "extra", "extra_share", "size", "ch", "multipliers", "blocks", "channels", "patch")
@settings_options(VAELossSettings(), AdversarialSettings())
@click.option(
    "--redrawn",
    type=FOLDER,
    help="Redrawn latents of the pictures in --data (far train redraw-latents), to decode some of them.",
)
@click.option(
    "--redrawn-share",
    type=SHARE,
    default=0.5,
    show_default=True,
    help="Share of the pictures in --data that are decoded from redrawn latents.",
)
@click.option("--init", type=FILE, help="Start from the weights of this KL-VAE, whose sizes count.")
@click.option("--freeze-encoder", is_flag=True, help="Train the decoder alone, so that the latents stay the same.")
@loop_options(LOOP)
@threads_option
def vae_command(
    settings: LoopSettings,
    multipliers: str,
    redrawn: Path | None,
    redrawn_share: float,
    init: Path | None,
    freeze_encoder: bool,
    **values: Any,
) -> None:
    """Train a KL-VAE.

    RUN/vae.safetensors is what FAR, MAR and the exporter read.
    """
    from far_models.checkpoint.load import load_checkpoint
    from far_models.kl_vae import VAEConfig
    from far_training.loop.trainer import train as run_loop
    from far_training.systems.vae import RedrawnSettings, VAEStart, vae_task

    loss, adversarial = pop_settings(VAELossSettings, values), pop_settings(AdversarialSettings, values)
    model = load_checkpoint(init, expect="klvae").model if init else None
    widths = whole_numbers(multipliers, "--multipliers")
    pictures = pop_pictures(values)
    config = model.config if model else VAEConfig(multipliers=widths, **values)
    redrawn_settings = RedrawnSettings(redrawn, redrawn_share) if redrawn else None
    start = VAEStart(model, freeze_encoder)
    task = vae_task(config, loss, pictures, settings.batch, settings.seed, start, adversarial, redrawn_settings)
    run_loop(task, settings, click.echo)


@click.command("vqvae")
@shared("pictures", "extra", "extra_share", "size", "ch", "multipliers", "blocks", "channels", "patch")
@click.option(
    "--vocabulary", type=click.IntRange(2), default=4096, show_default=True, help="Number of codes in the codebook."
)
@click.option("--phis", type=POSITIVE, default=4, show_default=True, help="Convolutions that the scales share.")
@click.option("--scales", help="Sides of the token maps, as 1,2,3,4,8; default: the official ones, up to the latents'.")
@settings_options(VQVAELossSettings())
@loop_options(LOOP)
@threads_option
def vqvae_command(settings: LoopSettings, multipliers: str, scales: str | None, **values: Any) -> None:
    """Train VAR's VQ-VAE.

    RUN/vqvae.safetensors is what VAR and the exporter read.
    """
    from far_models.vq_vae import VQVAEConfig
    from far_training.loop.trainer import train as run_loop
    from far_training.systems.vqvae import default_scales, vqvae_task

    loss, pictures = pop_settings(VQVAELossSettings, values), pop_pictures(values)
    sizes = VQVAEConfig(multipliers=whole_numbers(multipliers, "--multipliers"), **values)
    sides = whole_numbers(scales, "--scales") if scales else default_scales(pictures.grid(sizes.stride))
    if list(sides) != sorted(set(sides)):
        raise click.BadParameter(f"{scales}; expected rising numbers, as in 1,2,4,8", param_hint="--scales")
    config = VQVAEConfig(multipliers=sizes.multipliers, patch_nums=sides, **values)
    task = vqvae_task(config, loss, pictures, settings.batch, settings.seed)
    run_loop(task, settings, click.echo)


def pop_pictures(values: dict[str, Any]) -> PictureMixture:
    """The pictures of --data and --extra, whose options are taken out of `values`."""
    from far_models.pictures import open_pictures
    from far_training.data.mixture import PictureMixture

    folders = [folder for folder in (values.pop("data"), values.pop("extra")) if folder is not None]
    size, share = values.pop("size"), values.pop("extra_share")
    sets = [open_pictures(folder, size) for folder in folders]
    return PictureMixture(sets, [1 - share, share][: len(sets)])
