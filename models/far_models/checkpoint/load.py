"""Checkpoints into models, with every tensor checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far_models.checkpoint.config import far_config, mar_config, vae_config
from far_models.checkpoint.config_far_t2i import far_t2i_config
from far_models.checkpoint.config_var import parameters_of, var_config, vqvae_config
from far_models.checkpoint.file import FAR_WEIGHTS, VAE_WEIGHTS, Contents, read_contents
from far_models.checkpoint.settings import metadata_entry, parse_overrides
from far_models.far import FAR
from far_models.far_t2i import FART2I
from far_models.kl_vae import AutoencoderKL
from far_models.mar import MAR
from far_models.var import VAR
from far_models.vq_vae import VQVAE
from far_runtime.errors import FarError

__all__ = [
    "Checkpoint", "Contents", "build_far", "build_far_t2i", "build_mar", "build_vae", "check_tensors", "detect_system",
    "far_config", "load_checkpoint", "parse_overrides", "read_contents", "vae_config",
]  # fmt: skip

NOT_OF_THE_VAE = ("loss.",)  # discriminator and perceptual network that LDM's trainer saves beside the autoencoder
SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model in evaluation mode and its system (a key of SYSTEMS), with what else the file says.

    classes: names by label, or empty. sampling: the settings that the model was made to be drawn with (levels, steps,
    guidance, temperature; any may be absent). source: the name of the file it came from
    and of the weights that were taken ("model_ema", "model", "state_dict", or "" where the file has one set only).
    """

    system: str
    model: nn.Module
    classes: tuple[str, ...]
    sampling: dict[str, Any]
    source: dict[str, str]


def detect_system(contents: Contents) -> str:
    """The name of the system, told from the tensors' names; FarError where none fits."""
    names = contents.tensors.keys()
    for system, (sign, _) in SYSTEMS.items():
        if sign in names:
            return system
    shown = ", ".join(list(names)[:4])
    raise FarError(
        f"{contents.path}: no checkpoint of {', '.join(SYSTEMS)} (its tensors are {shown}, ...); "
        f"expected {' or '.join(sign for sign, _ in SYSTEMS.values())} among them"
    )


def load_checkpoint(
    path: str | Path, weights: str | None = None, overrides: Mapping[str, Any] | None = None, expect: str | None = None
) -> Checkpoint:
    """Load a FAR or KL-VAE checkpoint into its model.

    Sizes are read from the tensors; head counts, the masked switch and the prediction type come from the file's
    arguments or metadata, the presets, or `overrides` (FARConfig or VAEConfig fields; `heads` sets both head counts).
    `expect`: the system that the caller needs. `weights`: the state dict to take; by default model_ema, else model,
    else state_dict, but where a KL-VAE is expected model, else state_dict, else model_ema. Raises FarError, naming
    every missing, extra or misshapen tensor and those with NaN or Inf.
    """
    contents = read_contents(Path(path), weights, VAE_WEIGHTS if expect == "klvae" else FAR_WEIGHTS)
    system = detect_system(contents)
    if expect not in (None, system):
        raise FarError(f"{path}: is a {system} checkpoint; expected {expect} here")
    model = SYSTEMS[system][1](contents, dict(overrides or {}))
    return Checkpoint(
        system,
        model.eval(),
        tuple(metadata_entry(contents, "classes", [])),
        dict(metadata_entry(contents, "sampling", {})),
        {"file": contents.path.name, "weights": contents.weights},
    )


def _build(
    model_type: Callable[..., nn.Module], config: object, contents: Contents, tensors: dict[str, Tensor]
) -> nn.Module:
    with torch.device("meta"):
        model = model_type(config)
    check_tensors(contents.path, {name: p.shape for name, p in model.state_dict().items()}, tensors)
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    check_finite(contents.path, floats)
    model.load_state_dict(floats, assign=True)
    return model.requires_grad_(False)


def build_far(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A FAR in float32 with the file's weights (which stay memory-mapped where they were float32)."""
    return _build(FAR, far_config(contents, overrides), contents, contents.tensors)


def build_far_t2i(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A FAR-T2I in float32 with the file's weights."""
    return _build(FART2I, far_t2i_config(contents, overrides), contents, contents.tensors)


def build_mar(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A MAR in float32 with the file's weights."""
    return _build(MAR, mar_config(contents, overrides), contents, contents.tensors)


def build_vae(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A KL-VAE in float32 with the file's weights."""
    tensors = {name: t for name, t in contents.tensors.items() if not name.startswith(NOT_OF_THE_VAE)}
    return _build(AutoencoderKL, vae_config(contents, overrides), contents, tensors)


def build_var(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A VAR in float32 with the file's weights."""
    return _build(VAR, var_config(contents, overrides), contents, parameters_of(contents))


def build_vqvae(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """VAR's VQ-VAE in float32 with the file's weights."""
    return _build(VQVAE, vqvae_config(contents, overrides), contents, parameters_of(contents))


def check_tensors(path: Path, expected: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> None:
    """FarError that names every tensor which is missing, not expected, of another shape than expected, or not of
    floating-point numbers."""
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in given]
    problems += [f"not expected {name} {list(given[name].shape)}" for name in given if name not in expected]
    problems += [
        f"{name} is {list(given[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    problems += [
        f"{name} is {t.dtype}, expected floating point" for name, t in given.items() if not t.is_floating_point()
    ]
    if problems:
        raise FarError(f"{path}: {len(problems)} tensors do not fit the model: " + "; ".join(problems))


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """FarError that names the first tensors with NaN or Inf in them."""
    # The extremes show both, NaN too, and take no memory of the tensor's size.
    bad = [name for name, t in tensors.items() if t.numel() and not torch.stack(torch.aminmax(t)).isfinite().all()]
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise FarError(
            f"{path}: NaN or Inf in {', '.join(bad[:SHOWN])}{more}; the training diverged or the file is damaged: "
            "use another checkpoint or other --weights"
        )


# The first whose sign is there counts: FAR-T2I has FAR's sign too, and both have MAR's.
SYSTEMS: dict[str, tuple[str, Callable[[Contents, Mapping[str, Any]], nn.Module]]] = {
    "far_t2i": ("context_embed.weight", build_far_t2i),
    "far": ("diffloss.net.index_cond_embed.weight", build_far),
    "mar": ("diffloss.net.cond_embed.weight", build_mar),
    "var": ("pos_1LC", build_var),
    "vqvae": ("quantize.embedding.weight", build_vqvae),
    "klvae": ("post_quant_conv.weight", build_vae),
}
