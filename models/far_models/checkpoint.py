"""Checkpoints into models: official .pth and .ckpt files and .safetensors, read without executing anything that is
in them."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from far_models.far import FAR, PRESETS, FARConfig, grid_of
from far_models.kl_vae import AutoencoderKL, VAEConfig
from far_runtime.errors import FarError

WEIGHTS = ("model_ema", "model")
NOT_OF_THE_VAE = ("loss.",)  # discriminator and perceptual network that LDM's trainer saves beside the autoencoder


@dataclass(frozen=True)
class Contents:
    """What a file holds: tensors by official name, the training arguments (official `args`) and the safetensors
    metadata."""

    path: Path
    tensors: dict[str, Tensor]
    args: dict[str, Any]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model in evaluation mode and its system ("far" or "klvae"), with what else the file says.

    classes: names by label, or empty. sampling: the settings that the model was made to be drawn with (levels, steps,
    guidance, temperature; any may be absent). source: the file it came from.
    """

    system: str
    model: nn.Module
    classes: tuple[str, ...]
    sampling: dict[str, Any]
    source: dict[str, str]


def read_contents(path: Path, weights: str = "model_ema") -> Contents:
    """Tensors, arguments and metadata of a checkpoint file; `weights` names the state dict to take where the file
    holds several.

    Only tensors, plain values and an argparse.Namespace are unpickled. Tensors stay memory-mapped where the format
    allows. Raises FarError for a missing file, a file that is no checkpoint, and a pickle with anything else in it.
    """
    if not path.is_file():
        raise FarError(f"{path}: no such file; give the path of a .pth, .ckpt or .safetensors checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    state = _unpickle(path)
    if not isinstance(state, dict):
        raise FarError(f"{path}: holds a {type(state).__name__}; expected a dictionary of tensors")
    arguments = state.get("args")
    args = dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}
    return Contents(path, _state_dict(path, state, weights), args, {})


def _read_safetensors(path: Path) -> Contents:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return Contents(path, {name: file.get_tensor(name) for name in names}, {}, file.metadata() or {})
    except SafetensorError as error:
        raise FarError(f"{path}: not a safetensors file ({error}); is the download complete?") from error


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what it says of pickle protocols is no use to whoever gave a wrong file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL|global) ([\w.]+)", str(error))
        if refused is not None:
            raise FarError(
                f"{path}: holds more than tensors and an argparse.Namespace ({refused[1]}), and loading that could run "
                "code; save it again with only its state dicts, or as .safetensors"
            ) from error
        raise FarError(f"{path}: not a PyTorch checkpoint; expected .pth, .ckpt or .safetensors") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, UnicodeDecodeError, OSError) as error:
        told = isinstance(error, (RuntimeError, OSError)) and str(error)
        detail = str(error).splitlines()[0] if told else "its content is none"
        raise FarError(f"{path}: not a PyTorch checkpoint, or cut short ({detail})") from error


def _state_dict(path: Path, state: dict[str, Any], weights: str) -> dict[str, Tensor]:
    candidates = {name: state[name] for name in (*WEIGHTS, "state_dict") if isinstance(state.get(name), Mapping)}
    if weights in candidates:
        chosen: Mapping[str, Any] = candidates[weights]
    elif candidates and not any(name in candidates for name in WEIGHTS[:1]) and weights == "model_ema":
        chosen = candidates.get("model", next(iter(candidates.values())))  # kl16.ckpt has "model" only
    elif candidates:
        raise FarError(f"{path}: no weights called {weights!r}; the file has {', '.join(candidates)}; use --weights")
    else:
        chosen = state
    tensors = {name: value for name, value in chosen.items() if isinstance(value, Tensor)}
    if not tensors:
        raise FarError(f"{path}: no tensors found; expected a state dict, or one under model_ema or model")
    return tensors


def detect_system(contents: Contents) -> str:
    """ "far" or "klvae", told from the tensors' names; FarError where neither fits."""
    names = contents.tensors.keys()
    for system, (sign, _) in SYSTEMS.items():
        if sign in names:
            return system
    shown = ", ".join(list(names)[:4])
    raise FarError(
        f"{contents.path}: neither a FAR nor a KL-VAE checkpoint (its tensors are {shown}, ...); "
        f"expected {' or '.join(sign for sign, _ in SYSTEMS.values())} among them"
    )


def load_checkpoint(
    path: str | Path, weights: str = "model_ema", overrides: Mapping[str, Any] | None = None, expect: str | None = None
) -> Checkpoint:
    """Load a FAR or KL-VAE checkpoint into its model.

    Sizes are read from the tensors; head counts, the masked switch and the prediction type come from the file's
    arguments or metadata, the presets, or `overrides` (FARConfig or VAEConfig fields; `heads` sets both head counts).
    `expect`: the system that the caller needs. Raises FarError, naming every missing, extra or misshapen tensor.
    """
    contents = read_contents(Path(path), weights)
    system = detect_system(contents)
    if expect not in (None, system):
        raise FarError(f"{path}: is a {system} checkpoint; expected {expect} here")
    model = SYSTEMS[system][1](contents, dict(overrides or {}))
    return Checkpoint(
        system,
        model.eval(),
        tuple(_json_entry(contents, "classes", [])),
        dict(_json_entry(contents, "sampling", {})),
        {"file": contents.path.name, "weights": weights},
    )


def _json_entry(contents: Contents, key: str, default: Any) -> Any:
    """A JSON entry of the metadata, of the type of `default`; FarError where it is not."""
    try:
        value = json.loads(contents.metadata.get(key, "null"))
    except json.JSONDecodeError as error:
        raise FarError(f"{contents.path}: its metadata entry {key!r} is not JSON ({error}); save it again") from error
    if value is not None and type(value) is not type(default):
        raise FarError(f"{contents.path}: its metadata entry {key!r} is no {type(default).__name__}; save it again")
    return default if value is None else value


def _config_changes(contents: Contents, config_type: type, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `config_type` that the metadata and then the overrides state."""
    known = {field.name for field in fields(config_type)}
    changes = {k: v for k, v in _json_entry(contents, "config", {}).items() if k in known}
    for name, value in overrides.items():
        if name == "heads" and config_type is FARConfig:
            changes |= {"encoder_heads": value, "decoder_heads": value}
        elif name in known:
            changes[name] = value
        else:
            raise FarError(f"--config {name}: unknown setting; known: {', '.join(sorted(known))}")
    return changes


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def far_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> FARConfig:
    """Sizes of a FAR checkpoint; FarError where the tensors are not FAR's or the head counts cannot be known."""
    tensors, args = contents.tensors, contents.args
    try:
        width, channels = tensors["z_proj.weight"].shape
        decoder_width = tensors["decoder_embed.weight"].shape[0]
        tokens = tensors["diffusion_pos_embed_learned"].shape[1]
        sizes: dict[str, Any] = {
            "grid": grid_of(tokens),
            "channels": channels,
            "classes": tensors["class_emb.weight"].shape[0],
            "buffer": tensors["encoder_pos_embed_learned"].shape[1] - tokens,
            "encoder_width": width,
            "encoder_depth": _count(tensors, "encoder_blocks."),
            "decoder_width": decoder_width,
            "decoder_depth": _count(tensors, "decoder_blocks."),
            "mlp_ratio": tensors["encoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
            "head_width": tensors["diffloss.net.input_proj.weight"].shape[0],
            "head_depth": _count(tensors, "diffloss.net.res_blocks."),
        }
    except KeyError as error:
        raise FarError(
            f"{contents.path}: tensor {error.args[0]} is missing; is this a whole FAR checkpoint?"
        ) from error
    except ValueError as error:
        raise FarError(f"{contents.path}: {error}") from error
    if args.get("patch_size", 1) != 1:
        raise FarError(
            f"{contents.path}: patch_size {args['patch_size']}; the official sampler and this one know 1 only"
        )
    changes = _config_changes(contents, FARConfig, overrides or {})
    named: dict[str, Any] = {
        name: args[name] for name in ("prediction", "latent_scale", "encoder_heads", "decoder_heads") if name in args
    }
    if "mask" in args:
        named["masked"] = bool(args["mask"])
    heads = {p.encoder_width: p.encoder_heads for p in PRESETS.values()}
    base = PRESETS.get(str(args.get("model", "")))
    for part, part_width in (("encoder", width), ("decoder", decoder_width)):
        key = f"{part}_heads"
        if key in changes or key in named:
            continue
        if base is not None and getattr(base, f"{part}_width") == part_width:
            named[key] = getattr(base, key)
        elif part_width in heads:
            named[key] = heads[part_width]
        else:
            raise FarError(
                f"{contents.path}: the number of attention heads cannot be read from the weights and width "
                f"{part_width} is no "
                f"preset's ({', '.join(map(str, heads))}); give it: --config {key}=N (or heads=N)"
            )
    config = replace(FARConfig(), **{**named, **changes, **sizes})
    for part in ("encoder", "decoder"):
        part_width, count = getattr(config, f"{part}_width"), getattr(config, f"{part}_heads")
        if count < 1 or part_width % count:
            raise FarError(f"--config {part}_heads={count}: does not divide the {part}'s width {part_width}")
    return config


def vae_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> VAEConfig:
    """Sizes of a KL-VAE checkpoint; FarError where the tensors are not a KL-VAE's."""
    tensors = contents.tensors
    changes = _config_changes(contents, VAEConfig, overrides or {})
    try:
        ch, folded = tensors["encoder.conv_in.weight"].shape[:2]
        count = _count(tensors, "encoder.down.")
        widths = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(count)]
        sizes: dict[str, Any] = {
            "ch": ch,
            "multipliers": tuple(w // ch for w in widths),
            "blocks": _count(tensors, "encoder.down.0.block."),
            "channels": tensors["post_quant_conv.weight"].shape[0],
            "patch": grid_of(folded // 3),
            "encoder_attention": f"encoder.down.{count - 1}.attn.0.q.weight" in tensors,
        }
    except KeyError as error:
        raise FarError(
            f"{contents.path}: tensor {error.args[0]} is missing; is this a whole KL-VAE checkpoint?"
        ) from error
    except ValueError as error:
        raise FarError(
            f"{contents.path}: encoder.conv_in.weight takes {folded} channels; expected 3 x patch^2"
        ) from error
    return replace(VAEConfig(), **{**changes, **sizes})


def _build(
    model_type: Callable[..., nn.Module], config: object, contents: Contents, tensors: dict[str, Tensor]
) -> nn.Module:
    with torch.device("meta"):
        model = model_type(config)
    check_tensors(contents.path, {name: p.shape for name, p in model.state_dict().items()}, tensors)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(False)


def build_far(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A FAR in float32 with the file's weights (which stay memory-mapped where they were float32)."""
    return _build(FAR, far_config(contents, overrides), contents, contents.tensors)


def build_vae(contents: Contents, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A KL-VAE in float32 with the file's weights."""
    tensors = {name: t for name, t in contents.tensors.items() if not name.startswith(NOT_OF_THE_VAE)}
    return _build(AutoencoderKL, vae_config(contents, overrides), contents, tensors)


def check_tensors(path: Path, expected: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> None:
    """FarError that names every tensor which is missing, not expected, or of another shape than expected."""
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in given]
    problems += [f"not expected {name} {list(given[name].shape)}" for name in given if name not in expected]
    problems += [
        f"{name} is {list(given[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    if problems:
        raise FarError(f"{path}: {len(problems)} tensors do not fit the model: " + "; ".join(problems))


def parse_overrides(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Settings from `--config`: each a name=value pair (value read as JSON, else as text) or the path of a JSON
    file."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        try:
            if sign:
                settings[name.strip()] = json.loads(value)
            else:
                settings |= json.loads(Path(pair).read_text())
        except json.JSONDecodeError as error:
            if not sign:
                raise FarError(f"--config {pair}: not a JSON file ({error})") from error
            settings[name.strip()] = value
        except (OSError, TypeError, ValueError) as error:
            raise FarError(f"--config {pair}: neither NAME=VALUE nor a readable JSON file") from error
    return settings


SYSTEMS: dict[str, tuple[str, Callable[[Contents, Mapping[str, Any]], nn.Module]]] = {
    "far": ("diffloss.net.index_cond_embed.weight", build_far),
    "klvae": ("post_quant_conv.weight", build_vae),
}
