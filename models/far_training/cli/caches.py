"""The commands `far train cache-latents`, `far train redraw-latents` and `far train cache-text`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from far_training.cli.loop_options import threads_option
from far_training.cli.options import AMOUNT, FILE, FOLDER, POSITIVE, shared

OFFICIAL_TOKENS = 300


@click.command("cache-latents")
@shared("pictures")
@click.option("--vae", "vae_file", type=FILE, required=True, help="KL-VAE or VQ-VAE checkpoint.")
@shared("out", "size")
@click.option("--batch", type=POSITIVE, default=32, show_default=True, help="Pictures that are encoded at a time.")
@click.option("--half", is_flag=True, help="Store latents in float16.")
@threads_option
def cache_latents_command(data: Path, vae_file: Path, out: Path, size: int, batch: int, half: bool) -> None:
    """Encode all pictures once, so that training needs no encoder.

    Mirror images are encoded too. A KL-VAE gives latents (for FAR, MAR and FAR-T2I), a VQ-VAE gives tokens (for VAR).
    Start an interrupted run again to go on with it. Several processes (accelerate launch) share the work.
    """
    from far_models.checkpoint.load import load_checkpoint
    from far_models.pictures import open_pictures
    from far_runtime.errors import FarError
    from far_training.data.latents import write_cache
    from far_training.data.tokens import write_token_cache
    from far_training.loop.processes import process_group

    vae = load_checkpoint(vae_file)
    if vae.system not in ("klvae", "vqvae"):
        raise FarError(f"--vae {vae_file}: is a {vae.system} checkpoint; expected a klvae or vqvae one")
    pictures, group = open_pictures(data, size), process_group()
    vae.model.to(group.device)
    scale = None
    if vae.system == "vqvae":
        write_token_cache(vae.model, vae_file, pictures, out, batch, click.echo, group)
    else:
        scale = write_cache(vae.model, vae_file, pictures, out, batch, click.echo, half, group)
    if group.is_main:
        click.echo(f"wrote {out}" + (f"; latent scale {scale:.4f}" if scale else ""))


@click.command("redraw-latents")
@shared("pictures")
@click.option("--vae", "vae_file", type=FILE, required=True, help="KL-VAE checkpoint.")
@click.option("--far", "far_file", type=FILE, required=True, help="FAR checkpoint, trained on this VAE's latents.")
@shared("out")
@click.option("--draws", type=POSITIVE, default=8, show_default=True, help="Redrawn latents per picture.")
@click.option(
    "--levels",
    type=POSITIVE,
    default=1,
    show_default=True,
    help="Largest number of last levels that are redrawn; draw k redraws 1 + k mod LEVELS of them.",
)
@click.option("--steps", default="10", show_default=True, help="Diffusion steps at each level.")
@click.option("--guidance", type=AMOUNT, default=2.0, show_default=True, help="Guidance scale.")
@shared("size")
@click.option("--batch", type=POSITIVE, default=64, show_default=True, help="Pictures that are redrawn at a time.")
@threads_option
def redraw_latents_command(
    data: Path,
    vae_file: Path,
    far_file: Path,
    out: Path,
    draws: int,
    levels: int,
    size: int,
    batch: int,
    **sampling: Any,
) -> None:
    """Let FAR redraw the last levels of every picture.

    far train vae --redrawn learns from them to decode what FAR draws. Start an interrupted run again to go on with it.
    Several processes (accelerate launch) share the work.
    """
    from far_models.pictures import open_pictures
    from far_training.data.redrawn import RedrawSettings, write_redrawn
    from far_training.loop.processes import process_group

    pictures, group = open_pictures(data, size), process_group()
    write_redrawn(far_file, vae_file, pictures, out, RedrawSettings(draws, levels, batch, sampling), click.echo, group)
    if group.is_main:
        click.echo(f"wrote {out}")


@click.command("cache-text")
@shared("pictures")
@click.option(
    "--text-encoder",
    type=FOLDER,
    required=True,
    help="Hugging Face folder of a text encoder: config.json, weights and tokenizer.json.",
)
@shared("out")
@click.option(
    "--captions",
    type=FILE,
    help='JSON list with a text per picture; default: "a {style} emoji of {class}", or "a picture of {class}".',
)
@click.option(
    "--tokens",
    type=POSITIVE,
    default=OFFICIAL_TOKENS,
    show_default=True,
    help="Tokens to which each prompt is padded or cut.",
)
@shared("size")
@click.option("--batch", type=POSITIVE, default=32, show_default=True, help="Prompts that are encoded at a time.")
@threads_option
def cache_text_command(
    data: Path, text_encoder: Path, out: Path, captions: Path | None, tokens: int, size: int, batch: int
) -> None:
    """Encode the prompts of all pictures once, for FAR-T2I."""
    from far_models.pictures import open_pictures
    from far_models.text.encoder import load_text_encoder
    from far_training.data.prompts import write_text_cache
    from far_training.loop.processes import process_group

    pictures, encoder = open_pictures(data, size), load_text_encoder(text_encoder, tokens)
    encoder.network.to(process_group().device)
    write_text_cache(encoder, pictures, captions, out, batch, click.echo)
    click.echo(f"wrote {out}")
