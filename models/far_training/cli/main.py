"""The command group `far train`."""

from __future__ import annotations

import click

from far_training.cli.autoencoders import vae_command, vqvae_command
from far_training.cli.caches import cache_latents_command, cache_text_command, redraw_latents_command
from far_training.cli.far import far_command
from far_training.cli.far_t2i import far_t2i_command
from far_training.cli.mar import mar_command
from far_training.cli.var import var_command


@click.group()
def train() -> None:
    """Train the autoencoders and the generators on pictures."""


for command in (
    vae_command,
    vqvae_command,
    cache_latents_command,
    cache_text_command,
    redraw_latents_command,
    far_command,
    mar_command,
    far_t2i_command,
    var_command,
):
    train.add_command(command)
