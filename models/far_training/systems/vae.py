"""Training of the KL-VAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from far_models.checkpoint.save import export_checkpoint, metadata_of
from far_models.kl_vae import AutoencoderKL, VAEConfig
from far_runtime.errors import FarError, SettingName
from far_runtime.sampling.lowpass import lowpass_matrices
from far_training.data.mixture import MIRRORED, PictureMixture
from far_training.data.redrawn import RedrawnSet, open_redrawn
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Task
from far_training.systems.batches import run_args
from far_training.systems.discriminator import SMALLEST_SIDE, PatchDiscriminator, adversarial_losses
from far_training.systems.losses import gradient_l1, kl_per_cell
from far_training.systems.reconstructions import reconstruction_reporter
from far_training.systems.settings import AdversarialSettings, VAELossSettings


@dataclass(frozen=True)
class VAEStart:
    """What a KL-VAE starts from."""

    model: AutoencoderKL | None = None
    """Weights to start with; None for new ones."""
    freeze_encoder: bool = False
    """Whether the decoder is trained alone, so that the latents stay the same."""


@dataclass(frozen=True)
class RedrawnSettings:
    """How a decoder learns from redrawn latents (far train redraw-latents)."""

    folder: Path
    """Folder of the redrawn latents of the first picture set."""
    share: float = 0.5
    """Share of the samples of that set that are decoded from them."""


class VAELosses(nn.Module):
    """The KL-VAE's losses of a batch, as `VAEBatches` fetches it."""

    def __init__(
        self, model: AutoencoderKL, settings: VAELossSettings, grid: int, adversarial: AdversarialSettings
    ) -> None:
        """grid: side of the latents."""
        super().__init__()
        self.model = model
        self.settings = settings
        self.discriminator = PatchDiscriminator(adversarial.discriminator_width) if adversarial.adversarial else None
        size = grid * model.config.stride
        pixel_filters = np.stack([lowpass_matrices(size)[level * model.config.stride] for level in range(grid + 1)])
        self.register_buffer("latent_filters", torch.tensor(lowpass_matrices(grid)), persistent=False)
        self.register_buffer("pixel_filters", torch.from_numpy(pixel_filters), persistent=False)

    def forward(
        self,
        pictures: Tensor,
        noise: Tensor,
        disturbance: Tensor,
        level: Tensor,
        strength: Tensor,
        redrawn: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss [] and its terms, of pictures [B, 3, S, S] in [-1, 1].

        noise: of the posterior [B, C, g, g].
        disturbance: of the latents, as a part of the largest one [B, C, g, g].
        level: to which latents and pictures are low-passed []; the grid's side: not at all.
        strength: of the discriminator [].
        redrawn: latents [B, C, g, g] that are decoded for the samples of which `chosen` [B] is true.
        """
        mean, log_variance = (part.float() for part in self.model.encode(pictures))
        latents = mean + noise * (0.5 * log_variance).exp()
        if self.settings.latent_noise:
            largest = self.settings.latent_noise * mean.detach().std(dim=(1, 2, 3), keepdim=True)
            latents = latents + largest * disturbance
        if redrawn is not None and chosen is not None:
            latents = torch.where(chosen[:, None, None, None], redrawn, latents)
        filters, pixel_filters = self.latent_filters[level], self.pixel_filters[level]
        decoded = self.model.decode(filters @ latents @ filters.T).float()
        target = pixel_filters @ pictures @ pixel_filters.T
        # Rounding, and so a resumed run, depends on the order of these terms.
        l1 = (decoded - target).abs().mean()
        gradient = gradient_l1(decoded, target)
        kl = kl_per_cell(mean, log_variance)
        square = (decoded - target).square().mean()
        reconstruction = l1 + self.settings.square * square + self.settings.gradient * gradient
        terms = {"l1": l1, "square": square, "gradient_l1": gradient, "kl": kl}
        loss = reconstruction + self.settings.kl * kl
        if self.discriminator is not None:
            decoder_loss, judged = adversarial_losses(self.discriminator, decoded, target, reconstruction, strength)
            judged = judged * (level == len(self.latent_filters) - 1)  # not what is blurred on purpose
            loss = loss + decoder_loss + (judged - judged.detach())
            terms["discriminator"] = judged
        return {"loss": loss, **terms}


@dataclass(frozen=True)
class VAEBatches:
    """The batches that a KL-VAE is trained on."""

    pictures: PictureMixture
    batch: int
    """Pictures of a step."""
    shape: tuple[int, int, int]
    """Channels and sides of the latents (C, g, g)."""
    settings: VAELossSettings
    adversarial: AdversarialSettings
    redrawn: RedrawnSet | None = None
    """Redrawn latents of the first set's pictures."""
    redrawn_share: float = 0.0
    """Share of that set's samples that are decoded from them."""

    def fetch(self, rng: SampleRng, progress: float) -> tuple[Tensor, ...]:
        """The tensors that VAELosses takes, of the samples at the places of `rng`."""
        source, rows = self.pictures.rows(self.batch, rng)
        mirrored = rng.bernoulli(MIRRORED).numpy()
        decoded_instead: tuple[Tensor, ...] = ()
        if self.redrawn is not None:
            chosen = rng.bernoulli(self.redrawn_share).numpy() & (source == 0)
            mirrored &= ~chosen  # redrawn latents are of plain pictures
            draws = rng.integers(self.redrawn.draws).numpy()
            latents = torch.zeros(len(rows), *self.shape)
            latents[torch.from_numpy(chosen)] = self.redrawn.latents(rows[chosen], draws[chosen])
            decoded_instead = (latents, torch.from_numpy(chosen))
        pictures = self.pictures.pictures(source, rows, mirrored)
        level = grid = self.shape[-1]
        if grid > 1 and rng.shared.random() < self.settings.lowpass:
            level = int(rng.shared.integers(1, grid))
        disturbance = rng.uniform(1, 1, 1) * rng.normal(*self.shape)
        counts = level == grid and progress >= self.adversarial.adversarial_from
        strength = torch.tensor(self.adversarial.adversarial if counts else 0.0)
        return pictures, rng.normal(*self.shape), disturbance, torch.tensor(level), strength, *decoded_instead


def vae_task(
    config: VAEConfig,
    settings: VAELossSettings,
    pictures: PictureMixture,
    batch: int,
    seed: int,
    start: VAEStart | None = None,
    adversarial: AdversarialSettings | None = None,
    redrawn: RedrawnSettings | None = None,
) -> Task:
    """Training of a KL-VAE on pictures.

    config: the sizes of a new model, or those of `start`'s.
    batch: pictures of a step.
    seed: of new weights.
    FarError for picture sizes that do not fit the stride, each other or the discriminator, and for redrawn latents of
    another encoder or with an encoder that is trained.
    """
    start, adversarial = start or VAEStart(), adversarial or AdversarialSettings()
    size = pictures.sets[0].size
    if adversarial.adversarial and size < SMALLEST_SIDE:
        raise FarError(SettingName("adversarial"), f": pictures of {size} pixels; expected at least {SMALLEST_SIDE}")
    if redrawn is not None and not start.freeze_encoder:
        raise FarError(
            SettingName("redrawn"),
            ": the encoder would move away from these latents; give ",
            SettingName("freeze_encoder"),
            " and ",
            SettingName("init"),
        )
    grid = pictures.grid(config.stride)
    torch.manual_seed(seed)
    model = starting_model(config, start)
    losses = VAELosses(model, settings, grid, adversarial)
    latents = open_redrawn(redrawn.folder, pictures.sets[0], model) if redrawn is not None else None
    share = redrawn.share if redrawn is not None else 0.0
    batches = VAEBatches(
        pictures=pictures,
        batch=batch,
        shape=(config.channels, grid, grid),
        settings=settings,
        adversarial=adversarial,
        redrawn=latents,
        redrawn_share=share,
    )

    def finish(average: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(average, folder / "vae.safetensors", (), summary)

    return Task(
        system="klvae",
        model=model,
        losses=losses,
        fetch=batches.fetch,
        epoch_length=pictures.epoch_length,
        args=run_args("klvae", config, settings, adversarial)
        | {"loss_redrawn_share": share, "redrawn": latents.digest if latents else ""},
        report=reconstruction_reporter(pictures.sets, latents),
        finish=finish,
        metadata=metadata_of(model),
        discriminator=losses.discriminator,
    )


def starting_model(config: VAEConfig, start: VAEStart) -> AutoencoderKL:
    """The KL-VAE to train: `start`'s, or a new one."""
    model = start.model.train().requires_grad_(True) if start.model is not None else new_model(config)
    if start.freeze_encoder:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    return model


@torch.no_grad()
def new_model(config: VAEConfig, log_variance: float = -5.0) -> AutoencoderKL:
    """A new KL-VAE with a small posterior variance, so that noise does not drown what it learns first."""
    model = AutoencoderKL(config)
    model.quant_conv.weight[config.channels :].zero_()
    model.quant_conv.bias[config.channels :].fill_(log_variance)
    return model
