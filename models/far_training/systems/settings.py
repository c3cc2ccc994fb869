"""How each system is trained: the techniques of its loss, and the weights of its terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from far_runtime.errors import FarError, SettingName
from far_training.settings import Amount, Count, Decay, Factor, Positive, Range, Share, setting

MASK_LEAST_HELP = "Smallest share of masked tokens; the share is drawn from a normal around 1 and cut to this."
DROP_PATH_HELP = "Rate of dropped residual branches at the last block; default: 0.1 depth / 24."


@dataclass(frozen=True)
class FlipSettings:
    """How many samples are mirrored."""

    flip: Share = setting(0.5, "Share of mirrored samples.")
    flip_until: Share = setting(1.0, "Share of the run after which no sample is mirrored.")

    def flip_share(self, progress: float) -> float:
        """Share of mirrored samples at a share `progress` of the run."""
        return self.flip if progress < self.flip_until else 0.0


@dataclass(frozen=True)
class ClassSettings(FlipSettings):
    """How a model learns to do without the class, for guidance."""

    label_drop: Share = setting(0.1, "Share of samples that are trained without their class.")


@dataclass(frozen=True)
class DiffusionSettings(FlipSettings):
    """How a diffusion head is trained on latents."""

    input_noise: Amount = setting(
        0.0,
        "Standard deviation of the noise on the latents that the network sees, times |n| per sample with n standard "
        "normal.",
    )
    draws: Positive = setting(4, "Diffusion timesteps at which a step trains each token (diffusion_batch_mul).")
    learned_variance: bool = setting(
        True,
        "Whether the variance is learned, with the variational bound in the loss.",
        "--learned-variance/--fixed-variance",
    )


@dataclass(frozen=True)
class LevelSettings(DiffusionSettings):
    """How frequency levels are trained (FAR section 3.3)."""

    simplify: bool = setting(
        True,
        "Whether the target is the full latents at every level, or the latents low-passed to the next level.",
        "--simplify/--no-simplify",
    )
    weight_levels: bool = setting(True, "Frequency-aware loss weight.", "--level-weight/--no-level-weight")
    low: Amount = setting(
        0.0, "How much more often the lowest level is trained than the highest; 0: equally often, 1: twice as often."
    )


@dataclass(frozen=True)
class FARLossSettings(LevelSettings, ClassSettings):
    """The techniques of FAR's paper and of its released code, each of which can be switched.

    The first level sees nothing but the class. With `first="latents"` it learns to draw latents, as the other levels
    do. Their mean, which is all that level 1 sees of them, then comes from tokens that were drawn one by one, and lies
    between the pictures of a class. With `first="mean"` it learns to draw that mean itself. Drawn with one noise for
    all tokens (the sampler's `shared_noise`), it is the mean of one picture.
    """

    first: Literal["latents", "mean"] = setting(
        "latents",
        "What level 0 learns to draw: latents, as the other levels, or their mean, for --shared-noise 1; the mean "
        "needs cached latents.",
    )
    mask: Literal["off", "paper", "code"] = setting(
        "off", "Frequency-aware mask: masked more at low levels (paper) or at high ones (the released code)."
    )
    per_sample: bool = False
    """Whether every sample has a level of its own; otherwise all samples of a batch share one."""
    first_share: Share = setting(
        0.0, "Share of samples that are trained at level 0, whatever level was drawn for them."
    )
    dropout: Decay = setting(0.1, "Dropout rate of the transformer.")

    def __post_init__(self) -> None:
        if self.first == "mean" and not self.simplify:
            raise FarError(
                SettingName("first"),
                " mean: without simplification the first level draws the mean anyway; use ",
                SettingName("simplify"),
            )
        if self.mask != "off" and self.per_sample:
            raise FarError(
                "a masked model takes one level per batch, since all samples of a batch show equally many tokens; use ",
                SettingName("levels"),
                " batch",
            )


@dataclass(frozen=True)
class FART2ILossSettings(LevelSettings):
    """How FAR-T2I is trained: FAR's loss at a level per sample, under a prompt and always masked."""

    mask_least: Share = setting(0.7, MASK_LEAST_HELP)
    text_drop: Share = setting(0.1, "Share of samples that are trained without their prompt.")


@dataclass(frozen=True)
class MARLossSettings(DiffusionSettings, ClassSettings):
    """How MAR is trained (arXiv 2406.11838 section 4)."""

    mask_least: Share = setting(0.7, MASK_LEAST_HELP)
    dropout: Decay = setting(0.1, "Dropout rate of the transformer.")


@dataclass(frozen=True)
class VARLossSettings(ClassSettings):
    """How VAR is trained."""

    smoothing: Share = setting(0.0, "Label smoothing (discrete tokens).")
    drop_path: Share = setting(0.0, DROP_PATH_HELP)
    gain: Factor = setting(1e-5, "Initial scale of the blocks' residual branches (discrete tokens).")


@dataclass(frozen=True)
class VARHybridLossSettings(DiffusionSettings, ClassSettings):
    """How a hybrid between VAR and FAR is trained."""

    drop_path: Share = setting(0.0, DROP_PATH_HELP)


@dataclass(frozen=True)
class ReconstructionSettings:
    """Weights of a reconstruction loss: L1, plus these.

    The squared error lets the colours come early: L1 alone stays at the most common colour for long.
    """

    square: Amount = setting(1.0, "Weight of the mean squared error.")
    gradient: Amount = setting(0.5, "Weight of the L1 of pixel differences.")


@dataclass(frozen=True)
class VAELossSettings(ReconstructionSettings):
    """How a KL-VAE is trained."""

    kl: Amount = setting(2e-4, "Weight of the KL divergence, in nats per latent cell.")
    lowpass: Share = setting(
        0.25,
        "Share of the batches in which low-passed latents are decoded into the picture low-passed by the same factor, "
        "as for FAR's lower levels.",
    )
    latent_noise: Amount = setting(
        0.0,
        "Largest noise on the latents before decoding, in their standard deviations, so that the decoder forgives "
        "small errors of sampled latents.",
    )


@dataclass(frozen=True)
class AdversarialSettings:
    """How strongly a decoder is trained against a discriminator, and how wide that is.

    The strength is relative: the discriminator's gradient at a picture is scaled to this part of the norm of the
    reconstruction loss's. VQGAN (section 3.1) compares the gradients at the decoder's last layer. Comparing them at
    every picture costs no second pass through the decoder, and micro-batches add up to the whole batch.
    """

    adversarial: Amount = setting(
        0.0,
        "Weight of the patch discriminator's gradient, as a part of the reconstruction loss's; 0: no discriminator.",
    )
    adversarial_from: Share = setting(
        0.05, "Share of the run before the discriminator counts; it learns from the start."
    )
    discriminator_width: Annotated[int, Range(8)] = setting(64, "Channels of the discriminator's first convolution.")


@dataclass(frozen=True)
class VQVAELossSettings(ReconstructionSettings):
    """How a VQ-VAE is trained.

    A code that is out of use takes the place of a vector that the batch left to code. This happens in the first step,
    in which no code is in use yet, and every `restart` steps after it.
    """

    quantization: Amount = setting(1.0, "Weight of codebook loss + 0.25 commitment loss, averaged over the scales.")
    restart: Count = setting(50, "Steps between which codes that are out of use get a new place; 0: they never do.")
    restart_until: Share = setting(0.6, "Share of the run after which codes keep their places.")
