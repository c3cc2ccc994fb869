"""The command group `far train`."""

from __future__ import annotations

import click

from far_models.training.cli_cache import cache_latents_command, cache_text_command, redraw_latents_command
from far_models.training.cli_far import far_command
from far_models.training.cli_mar import mar_command
from far_models.training.cli_t2i import far_t2i_command
from far_models.training.cli_vae import vae_command, vqvae_command
from far_models.training.cli_var import var_command


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
