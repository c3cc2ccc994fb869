"""Checkpoints to models, with every tensor checked."""

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

VAE_IGNORED = ("loss.",)
"""Prefixes of the discriminator and the perceptual network that LDM's trainer saves beside the autoencoder."""
MAX_NAMES = 5
"""Tensors that an error message names."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and what its file states beside the weights."""

    system: str
    """A key of SYSTEMS."""
    model: nn.Module
    """The model in evaluation mode."""
    classes: tuple[str, ...]
    """Class names by label; may be empty."""
    sampling: dict[str, Any]
    """The model's own sampling settings by name (levels, steps, guidance, ...); any may be absent."""
    source: dict[str, str]
    """"file": name of the file. "weights": name of the chosen state dict, or "" where the file has only one."""


def detect_system(contents: Contents) -> str:
    """The system of a checkpoint, by the names of its tensors; FarError where it is of none."""
    names = contents.tensors.keys()
    for system, (marker, _) in SYSTEMS.items():
        if marker in names:
            return system
    first_names = ", ".join(list(names)[:4])
    raise FarError(
        f"{contents.path}: no checkpoint of {', '.join(SYSTEMS)} (its tensors are {first_names}, ...); "
        f"expected {' or '.join(marker for marker, _ in SYSTEMS.values())} among them"
    )


def load_checkpoint(
    path: str | Path, weights: str | None = None, overrides: Mapping[str, Any] | None = None, expect: str | None = None
) -> Checkpoint:
    """Load a checkpoint of any system into its model.

    weights: the state dict to choose; by default the first of FAR_WEIGHTS, or of VAE_WEIGHTS where a KL-VAE is
    expected.
    overrides: fields of the system's configuration; `heads` sets both numbers of heads of a FAR.
    expect: the system that the caller needs.

    Sizes are read from the tensors. Other settings come from the overrides, the file's metadata, its training arguments
    or the presets, in this order. Raises FarError that names every tensor which is missing, not expected, of another
    shape, or with NaN or Inf in it.
    """
    contents = read_contents(Path(path), weights, VAE_WEIGHTS if expect == "klvae" else FAR_WEIGHTS)
    system = detect_system(contents)
    if expect not in (None, system):
        raise FarError(f"{path}: is a {system} checkpoint; expected {expect} here")
    model = SYSTEMS[system][1](contents, dict(overrides or {}))
    return Checkpoint(
        system=system,
        model=model.eval(),
        classes=tuple(metadata_entry(contents, "classes", [])),
        sampling=dict(metadata_entry(contents, "sampling", {})),
        source={"file": contents.path.name, "weights": contents.weights},
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
    """A FAR in float32 with the file's weights, which stay memory-mapped where they are float32."""
    return _build(FAR, far_config(contents, overrides), contents, contents.tensors)


def build_far_t2i(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A FAR-T2I in float32 with the file's weights."""
    return _build(FART2I, far_t2i_config(contents, overrides), contents, contents.tensors)


def build_mar(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A MAR in float32 with the file's weights."""
    return _build(MAR, mar_config(contents, overrides), contents, contents.tensors)


def build_vae(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A KL-VAE in float32 with the file's weights."""
    tensors = {name: t for name, t in contents.tensors.items() if not name.startswith(VAE_IGNORED)}
    return _build(AutoencoderKL, vae_config(contents, overrides), contents, tensors)


def build_var(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A VAR in float32 with the file's weights."""
    return _build(VAR, var_config(contents, overrides), contents, parameters_of(contents))


def build_vqvae(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """VAR's VQ-VAE in float32 with the file's weights."""
    return _build(VQVAE, vqvae_config(contents, overrides), contents, parameters_of(contents))


def check_tensors(path: Path, expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    """Raise FarError that names every tensor which is missing, not expected, of another shape than expected, or not
    floating point."""
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    problems += [f"not expected {name} {list(tensors[name].shape)}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [
        f"{name} is {t.dtype}, expected floating point" for name, t in tensors.items() if not t.is_floating_point()
    ]
    if problems:
        raise FarError(f"{path}: {len(problems)} tensors do not fit the model: " + "; ".join(problems))


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise FarError that names the first tensors with NaN or Inf in them."""
    # Minimum and maximum show both, and need no memory of the tensor's size as isfinite() does.
    bad = [name for name, t in tensors.items() if t.numel() and not torch.stack(torch.aminmax(t)).isfinite().all()]
    if bad:
        more = f" and {len(bad) - MAX_NAMES} more" if len(bad) > MAX_NAMES else ""
        raise FarError(
            f"{path}: NaN or Inf in {', '.join(bad[:MAX_NAMES])}{more}; the training diverged or the file is damaged: "
            "use another checkpoint or other --weights"
        )


# In this order: FAR-T2I has FAR's marker too, and both have MAR's.
SYSTEMS: dict[str, tuple[str, Callable[[Contents, Mapping[str, Any]], nn.Module]]] = {
    "far_t2i": ("context_embed.weight", build_far_t2i),
    "far": ("diffloss.net.index_cond_embed.weight", build_far),
    "mar": ("diffloss.net.cond_embed.weight", build_mar),
    "var": ("pos_1LC", build_var),
    "vqvae": ("quantize.embedding.weight", build_vqvae),
    "klvae": ("post_quant_conv.weight", build_vae),
}
"""By system: a tensor that marks its checkpoints, and the function that builds the model."""
