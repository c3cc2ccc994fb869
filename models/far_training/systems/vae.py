"""Training of the KL-VAE, and what its trainer shares with the VQ-VAE's: pictures to train on and reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from far_models.checkpoint.save import export_checkpoint, metadata_of
from far_models.kl_vae import AutoencoderKL, VAEConfig
from far_models.pictures import PictureSet, mixed_rows
from far_models.reconstruction import comparison, decode_pixels, evenly, psnr, reconstruction_psnr, save_picture
from far_runtime.errors import FarError
from far_runtime.sampling.lowpass import lowpass_matrices
from far_training.data.redrawn import RedrawnSet, open_redrawn
from far_training.loop.randomness import SampleRng
from far_training.loop.task import Task
from far_training.systems.batches import run_args
from far_training.systems.discriminator import SMALLEST, AdversarialSettings, PatchDiscriminator, adversarial_losses
from far_training.systems.losses import gradient_l1, kl_per_cell


@dataclass(frozen=True)
class VAELossSettings:
    """Weights of the loss: L1 + `square` x squared error + `gradient` x L1 of pixel differences + `kl` x nats per cell.

    The squared error makes the colours come early: L1 alone stays at the most common colour for long.

    In a share `lowpass` of the batches the latents are low-passed before decoding and the picture to match is
    low-passed by the same factor, so that the latents of FAR's intermediate levels decode to blurred pictures.
    `latent_noise`: the decoder sees latents disturbed by up to so many of the picture's standard deviations (a random
    share of it), so that it forgives the small errors of sampled latents.
    """

    square: float = 1.0
    gradient: float = 0.5
    kl: float = 2e-4
    lowpass: float = 0.25
    latent_noise: float = 0.0


@dataclass(frozen=True)
class Redrawn:
    """A folder of latents that FAR drew of the training pictures (far train redraw-latents), and the share of samples
    of the first picture set that are decoded from them."""

    folder: Path
    share: float = 0.5


class VAELosses(nn.Module):
    """Losses of pictures [B, 3, S, S] in [-1, 1], latent noise and disturbance [B, C, h, w] (of a standard deviation of
    a share of the most), a level (the grid's side: none) and the adversarial strength; then, where some are decoded
    from redrawn latents, those [B, C, h, w] and which pictures [B] they are of."""

    def __init__(
        self, model: AutoencoderKL, settings: VAELossSettings, grid: int, against: AdversarialSettings
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.discriminator = PatchDiscriminator(against.discriminator_width) if against.adversarial else None
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
        mean, log_variance = (part.float() for part in self.model.encode(pictures))
        latents = mean + noise * (0.5 * log_variance).exp()
        if self.settings.latent_noise:
            most = self.settings.latent_noise * mean.detach().std(dim=(1, 2, 3), keepdim=True)
            latents = latents + most * disturbance
        if redrawn is not None and chosen is not None:
            latents = torch.where(chosen[:, None, None, None], redrawn, latents)
        filters, pixel_filters = self.latent_filters[level], self.pixel_filters[level]
        decoded = self.model.decode(filters @ latents @ filters.T).float()
        wanted = pixel_filters @ pictures @ pixel_filters.T
        l1 = (decoded - wanted).abs().mean()
        gradient = gradient_l1(decoded, wanted)
        kl = kl_per_cell(mean, log_variance)
        square = (decoded - wanted).square().mean()
        reconstruction = l1 + self.settings.square * square + self.settings.gradient * gradient
        loss = reconstruction + self.settings.kl * kl
        found = {"l1": l1, "square": square, "gradient_l1": gradient, "kl": kl}
        if self.discriminator is not None:
            pushed, judged = adversarial_losses(self.discriminator, decoded, wanted, reconstruction, strength)
            judged = judged * (level == len(self.latent_filters) - 1)  # not what is blurred on purpose
            loss = loss + pushed + (judged - judged.detach())
            found["discriminator"] = judged
        return {"loss": loss, **found}


def vae_task(
    config: VAEConfig,
    loss_settings: VAELossSettings,
    sets: Sequence[PictureSet],
    shares: Sequence[float],
    batch: int,
    seed: int,
    start: AutoencoderKL | None = None,
    freeze_encoder: bool = False,
    against: AdversarialSettings | None = None,
    redrawn: Redrawn | None = None,
) -> Task:
    """Training of a KL-VAE on one or several picture sets; `shares` are their parts of each batch.

    `start`: weights to begin with. `freeze_encoder`: train the decoder alone, so that the latents stay what they were.
    `against`: the discriminator. `redrawn`: latents of the first set's pictures that FAR drew, for some of them.
    FarError for picture sizes that do not fit the stride, each other or the discriminator, and redrawn latents of
    another encoder or for one that moves.
    """
    against = against or AdversarialSettings()
    if against.adversarial and sets[0].size < SMALLEST:
        raise FarError(f"--adversarial: pictures of {sets[0].size} pixels; expected at least {SMALLEST}")
    if redrawn is not None and not freeze_encoder:
        raise FarError("--redrawn: the encoder would move away from these latents; give --freeze-encoder and --init")
    grid = grid_of_pictures(sets, config.stride)
    torch.manual_seed(seed)
    model = start.train().requires_grad_(True) if start is not None else start_certain(AutoencoderKL(config))
    if freeze_encoder:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    losses = VAELosses(model, loss_settings, grid, against)
    anew = open_redrawn(redrawn.folder, sets[0], model) if redrawn is not None else None

    shape = (config.channels, grid, grid)

    def fetch(chance: SampleRng, done: float) -> tuple[Tensor, ...]:
        source, rows = drawn_rows(sets, shares, batch, chance)
        flip = chance.happens(0.5).numpy()
        more: tuple[Tensor, ...] = ()
        if redrawn is not None and anew is not None:
            chosen = (chance.happens(redrawn.share).numpy()) & (source == 0)
            flip &= ~chosen  # they are not mirrored
            latents = torch.zeros(len(rows), *shape)
            latents[torch.from_numpy(chosen)] = anew.latents(rows[chosen], chance.integers(anew.draws).numpy()[chosen])
            more = (latents, torch.from_numpy(chosen))
        pictures = pictures_of(sets, source, rows, flip)
        shared = chance.of_step
        level = int(shared.integers(1, grid)) if grid > 1 and shared.random() < loss_settings.lowpass else grid
        disturbance = chance.uniform(1, 1, 1) * chance.normal(*shape)
        counts = level == grid and done >= against.adversarial_from
        strength = torch.tensor(against.adversarial if counts else 0.0)
        return pictures, chance.normal(*shape), disturbance, torch.tensor(level), strength, *more

    def finish(ema: nn.Module, folder: Path, summary: dict[str, Any]) -> None:
        export_checkpoint(ema, folder / "vae.safetensors", (), summary)

    args = run_args("klvae", config, loss_settings)
    args |= {f"loss_{key}": value for key, value in asdict(against).items()}
    args |= {"loss_redrawn_share": redrawn.share if redrawn else 0.0, "redrawn": anew.digest if anew else ""}
    report = reconstruction_reporter(sets, anew)
    metadata, beside = metadata_of(model), losses.discriminator
    count = len(sets[0].train)
    return Task("klvae", model, losses, fetch, count, args, report, finish, metadata=metadata, beside=beside)


def grid_of_pictures(sets: Sequence[PictureSet], stride: int) -> int:
    """Side of the latents of the pictures; FarError for sizes that do not fit each other or the stride."""
    size = sets[0].size
    if any(pictures.size != size for pictures in sets):
        raise FarError(
            f"pictures of {', '.join(str(p.size) for p in sets)} pixels cannot be mixed; prepare them at one size"
        )
    if size % stride:
        raise FarError(
            f"pictures of {size} pixels do not fit a VAE of stride {stride}; "
            "choose --multipliers and --patch so that it divides"
        )
    return size // stride


def drawn_pictures(sets: Sequence[PictureSet], shares: Sequence[float], batch: int, chance: SampleRng) -> Tensor:
    """The pictures [n, 3, S, S] in [-1, 1] of a step's samples, half of them mirrored."""
    source, rows = drawn_rows(sets, shares, batch, chance)
    return pictures_of(sets, source, rows, chance.happens(0.5).numpy())


def drawn_rows(
    sets: Sequence[PictureSet], shares: Sequence[float], batch: int, chance: SampleRng
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The set [n] of each of a step's samples, and its row [n] in it."""
    parts = mixed_rows(chance.step, batch, [len(p.train) for p in sets], shares, chance.seed)
    rows = np.concatenate([p.train[part] for p, part in zip(sets, parts, strict=True)])
    source = np.repeat(np.arange(len(sets)), [len(part) for part in parts])
    return source[chance.places], rows[chance.places]


def pictures_of(
    sets: Sequence[PictureSet], source: NDArray[np.int64], rows: NDArray[np.int64], flip: NDArray[np.bool_]
) -> Tensor:
    """Pictures [n, 3, S, S] in [-1, 1] of these rows of these sets; those with `flip` set are mirrored."""
    pixels = torch.empty(len(rows), 3, sets[0].size, sets[0].size)
    for i, pictures in enumerate(sets):
        own = source == i
        if own.any():
            pixels[torch.from_numpy(own)] = pictures.pixels(rows[own], flip[own])
    return pixels


def reconstruction_reporter(
    sets: Sequence[PictureSet], anew: RedrawnSet | None = None
) -> Callable[[nn.Module, int, Path], dict[str, float]]:
    """The trainer's report hook: a sheet of reconstructions, and their PSNR on training and held-out pictures; on
    pictures decoded from their first redrawn latents too."""

    def report(ema: nn.Module, step: int, folder: Path) -> dict[str, float]:
        rows = evenly(sets[0].train, 32)
        save_picture(comparison(ema, sets[0], rows), folder / "sheets" / f"reconstruction-{step:06d}.png")
        numbers = {"psnr_train": reconstruction_psnr(ema, sets[0], evenly(sets[0].train, 128))}
        held_out = [(p, p.held_out) for p in sets if len(p.held_out)]
        if held_out:
            found = [reconstruction_psnr(ema, p, evenly(rows, 128)) for p, rows in held_out]
            numbers["psnr_held_out"] = float(np.average(found, weights=[min(len(rows), 128) for _, rows in held_out]))
        if anew is not None:
            rows = evenly(sets[0].train, 128)
            decoded = decode_pixels(ema, anew.latents(rows, np.zeros_like(rows)))
            numbers["psnr_redrawn"] = psnr(decoded, sets[0].read(rows))
        return numbers

    return report


@torch.no_grad()
def start_certain(model: AutoencoderKL, log_variance: float = -5.0) -> AutoencoderKL:
    """Let a new VAE start with a small posterior variance, so that noise does not drown what it learns first."""
    channels = model.config.channels
    model.quant_conv.weight[channels:].zero_()
    model.quant_conv.bias[channels:].fill_(log_variance)
    return model
