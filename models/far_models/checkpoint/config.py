"""A model's configuration from its checkpoint: sizes from the tensors, the rest from arguments, metadata and
`--config`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from far_models.checkpoint.file import Contents
from far_models.far import FAR, PRESETS, FARConfig, grid_of
from far_models.kl_vae import AutoencoderKL, VAEConfig
from far_models.mar import PRESETS as MAR_PRESETS
from far_runtime.errors import FarError
from far_runtime.sampling.lowpass import FILTERS
from far_runtime.sampling.noise_schedule import PREDICTIONS

ALLOWED = {"prediction": PREDICTIONS, "filter": tuple(FILTERS)}
WORDS = {"true": True, "yes": True, "false": False, "no": False}
FAR_RANKS = {
    "z_proj.weight": 2,
    "decoder_embed.weight": 2,
    "diffusion_pos_embed_learned": 3,
    "encoder_pos_embed_learned": 3,
    "class_emb.weight": 2,
    "encoder_blocks.0.mlp.fc1.weight": 2,
    "decoder_blocks.0.mlp.fc1.weight": 2,
    "diffloss.net.input_proj.weight": 2,
}
VAE_RANKS = {"encoder.conv_in.weight": 4, "post_quant_conv.weight": 4}
NOT_STATED = ("encoder_heads", "decoder_heads", "masked", "prediction", "latent_scale", "filter")  # by FAR's tensors


def json_entry(contents: Contents, key: str, default: Any) -> Any:
    """A JSON entry of the metadata, of the type of `default`; FarError where it is not."""
    try:
        value = json.loads(contents.metadata.get(key, "null"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FarError(f"{contents.path}: its metadata entry {key!r} is not JSON ({error}); save it again") from error
    if value is not None and type(value) is not type(default):
        raise FarError(f"{contents.path}: its metadata entry {key!r} is no {type(default).__name__}; save it again")
    return default if value is None else value


def parse_overrides(pairs: tuple[str, ...], option: str = "--config") -> dict[str, Any]:
    """Settings from an option such as `--config`: each a name=value pair (value read as JSON, else as text) or the
    path of a JSON file."""
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
                raise FarError(f"{option} {pair}: not a JSON file ({error})") from error
            settings[name.strip()] = value
        except (OSError, TypeError, ValueError) as error:
            raise FarError(f"{option} {pair}: neither NAME=VALUE nor a readable JSON file") from error
    return settings


def checked(name: str, value: Any, kind: str, where: str) -> Any:
    """The value of a setting whose dataclass field has the annotation `kind`; FarError, which begins with `where`,
    where it is of another type or none of the allowed values."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    wanted = ""
    if kind == "bool":
        if isinstance(value, str):
            value = WORDS.get(value.strip().lower(), value)
        wanted = "" if isinstance(value, bool) else "true or false"
    elif kind == "int":
        least = 0 if name == "buffer" else 1
        wanted = "" if whole and value >= least else f"a whole number from {least}"
    elif kind == "float":
        fits = (whole and abs(value) < 2**53) or isinstance(value, float)
        wanted = "" if fits and math.isfinite(value) and value > 0 else "a finite number above 0"
    elif kind == "str":
        wanted = "" if isinstance(value, str) and value in ALLOWED[name] else " or ".join(ALLOWED[name])
    else:
        value = tuple(value) if isinstance(value, (list, tuple)) else value
        fits = isinstance(value, tuple) and all(type(item) is int and item > 0 for item in value)
        wanted = "" if fits and value else "a list of whole numbers from 1"
    if wanted:
        raise FarError(f"{where} {name}={value!r}: expected {wanted}")
    return value


def stated_settings(
    contents: Contents, config_type: type, overrides: Mapping[str, Any], sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of `config_type` that the metadata and then the overrides state; FarError for a value that is not
    allowed and for a size that is not that of the tensors."""
    kinds = {field.name: str(field.type) for field in fields(config_type)}
    for name in overrides:
        if name not in kinds and not (name == "heads" and config_type is FARConfig):
            raise FarError(f"--config {name}: unknown setting; known: {', '.join(sorted(kinds))}")
    stated = {name: value for name, value in json_entry(contents, "config", {}).items() if name in kinds}
    changes: dict[str, Any] = {}
    for where, settings in ((f"{contents.path}: metadata", stated), ("--config", overrides)):
        for given, value in settings.items():
            both = given == "heads" and given not in kinds
            for name in ("encoder_heads", "decoder_heads") if both else (given,):
                changes[name] = value = checked(given if both else name, value, kinds[name], where)
                if name in sizes and not _same_size(name, value, sizes):
                    raise FarError(
                        f"{where} {name}={value!r}: the tensors of {contents.path.name} say {sizes[name]!r}; sizes are "
                        "read from them: leave it out"
                    )
    return changes


def _same_size(name: str, value: Any, sizes: Mapping[str, Any]) -> bool:
    if name == "mlp_ratio":  # the hidden width is rounded, so that several ratios mean the same tensors
        width = sizes.get("encoder_width") or sizes["width"]
        return round(width * value) == round(width * sizes[name])
    return bool(value == sizes[name])


def count_of(contents: Contents, prefix: str) -> int:
    """How many numbered modules the file has under a prefix such as "encoder_blocks."."""
    indices = (name[len(prefix) :].split(".")[0] for name in contents.tensors if name.startswith(prefix))
    return len({index for index in indices if index.isdecimal()})


def shapes_of(
    contents: Contents, ranks: Mapping[str, int], model_type: Callable[..., nn.Module], config: object
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that state the sizes; FarError that names all that are missing, with names in the file
    that no such model has, or those of another rank than expected or without entries."""
    tensors = contents.tensors
    missing = [name for name in ranks if name not in tensors]
    if missing:
        with torch.device("meta"):
            known = {_pattern(name) for name in model_type(config).state_dict()}
        unknown = [name for name in tensors if _pattern(name) not in known and not name.startswith("loss.")][:5]
        beside = f"; not known: {', '.join(unknown)}" if unknown else ""
        raise FarError(
            f"{contents.path}: missing {', '.join(missing)}{beside}; is this a whole {model_type.__name__} checkpoint?"
        )
    shapes = {name: tuple(tensors[name].shape) for name in ranks}
    wrong = [
        f"{name} is {list(shapes[name])}, expected {rank} dimensions, none of them 0"
        for name, rank in ranks.items()
        if len(shapes[name]) != rank or 0 in shapes[name]
    ]
    if wrong:
        raise FarError(f"{contents.path}: {'; '.join(wrong)}")
    return shapes


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "N", name)


def _far_sizes(contents: Contents) -> dict[str, Any]:
    shapes = shapes_of(contents, FAR_RANKS, FAR, FARConfig())
    width, channels = shapes["z_proj.weight"]
    places, tokens = shapes["encoder_pos_embed_learned"][1], shapes["diffusion_pos_embed_learned"][1]
    try:
        grid = grid_of(tokens)
    except ValueError as error:
        shape = list(shapes["diffusion_pos_embed_learned"])
        raise FarError(f"{contents.path}: diffusion_pos_embed_learned is {shape}: {error}") from error
    if places < tokens:
        shape = list(shapes["encoder_pos_embed_learned"])
        raise FarError(f"{contents.path}: encoder_pos_embed_learned is {shape}; expected at least {tokens} places")
    head_depth = count_of(contents, "diffloss.net.res_blocks.")
    if not head_depth:
        raise FarError(f"{contents.path}: no tensors called diffloss.net.res_blocks.*; is this a whole FAR checkpoint?")
    return {
        "grid": grid,
        "channels": channels,
        "classes": shapes["class_emb.weight"][0],
        "buffer": places - tokens,
        "encoder_width": width,
        "encoder_depth": count_of(contents, "encoder_blocks."),
        "decoder_width": shapes["decoder_embed.weight"][0],
        "decoder_depth": count_of(contents, "decoder_blocks."),
        "mlp_ratio": shapes["encoder_blocks.0.mlp.fc1.weight"][0] / width,
        "head_width": shapes["diffloss.net.input_proj.weight"][0],
        "head_depth": head_depth,
    }


def _far_arguments(contents: Contents) -> dict[str, Any]:
    """The settings that the training arguments state; None there means that they do not."""
    args = {name: value for name, value in contents.args.items() if value is not None}
    if args.get("patch_size", 1) != 1:
        raise FarError(
            f"{contents.path}: patch_size {args['patch_size']}; the official sampler and this one know 1 only"
        )
    kinds = {field.name: str(field.type) for field in fields(FARConfig)}
    where = f"{contents.path}: args"
    named = {name: checked(name, args[name], kinds[name], where) for name in NOT_STATED[:2] if name in args}
    named |= {name: checked(name, args[name], kinds[name], where) for name in NOT_STATED[3:] if name in args}
    if "mask" in args:
        mask = args["mask"]
        named["masked"] = checked("mask", bool(mask) if mask in (0, 1) else mask, "bool", where)
    return named


def mar_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> FARConfig:
    """Sizes and settings of a MAR checkpoint, as `far_config`; it is always masked, and FarError where it is told
    not to be."""
    given = {"masked": True, **(overrides or {})}
    if not checked("masked", given["masked"], "bool", "--config"):
        raise FarError(
            f"--config masked={given['masked']}: {contents.path.name} is a MAR, which is masked; leave it out"
        )
    return far_config(contents, given, MAR_PRESETS)


def far_config(
    contents: Contents, overrides: Mapping[str, Any] | None = None, presets: Mapping[str, FARConfig] = PRESETS
) -> FARConfig:
    """Sizes and settings of a FAR checkpoint; FarError where the tensors are not FAR's, a setting is not allowed, or
    the head counts or the variant cannot be known."""
    sizes = _far_sizes(contents)
    settings = _far_arguments(contents) | stated_settings(contents, FARConfig, overrides or {}, sizes)
    heads = {p.encoder_width: p.encoder_heads for p in presets.values()}
    base = presets.get(str(contents.args.get("model", "")))
    for part in ("encoder", "decoder"):
        key, width = f"{part}_heads", sizes[f"{part}_width"]
        if key in settings:
            continue
        if base is not None and getattr(base, f"{part}_width") == width:
            settings[key] = getattr(base, key)
        elif width in heads:
            settings[key] = heads[width]
        else:
            raise FarError(
                f"{contents.path}: the number of attention heads cannot be read from the weights and width {width} is "
                f"no preset's ({', '.join(map(str, heads))}); give it: --config {key}=N (or heads=N)"
            )
    for part in ("encoder", "decoder"):
        count, width = settings[f"{part}_heads"], sizes[f"{part}_width"]
        if width % count:
            raise FarError(f"--config {part}_heads={count}: does not divide the {part}'s width {width}")
    if "masked" not in settings:
        raise FarError(
            f"{contents.path}: does not say whether the model is the masked variant (both have the same tensors); "
            "give it: --config masked=true or masked=false"
        )
    return replace(FARConfig(), **{**settings, **sizes})


def vae_config(contents: Contents, overrides: Mapping[str, Any] | None = None) -> VAEConfig:
    """Sizes of a KL-VAE checkpoint; FarError where the tensors are not a KL-VAE's."""
    count = count_of(contents, "encoder.down.")
    levels = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(count, 1))]
    shapes = shapes_of(contents, VAE_RANKS | dict.fromkeys(levels, 4), AutoencoderKL, VAEConfig())
    ch, folded = shapes["encoder.conv_in.weight"][:2]
    if folded % 3 or math.isqrt(folded // 3) ** 2 != folded // 3:
        raise FarError(
            f"{contents.path}: encoder.conv_in.weight {list(shapes['encoder.conv_in.weight'])} takes {folded} "
            "channels; expected 3 x patch^2"
        )
    for name in levels:
        if shapes[name][0] % ch:
            raise FarError(f"{contents.path}: {name} is {list(shapes[name])}; expected a multiple of {ch} channels")
    sizes: dict[str, Any] = {
        "ch": ch,
        "multipliers": tuple(shapes[name][0] // ch for name in levels),
        "blocks": count_of(contents, "encoder.down.0.block."),
        "channels": shapes["post_quant_conv.weight"][0],
        "patch": math.isqrt(folded // 3),
        "encoder_attention": f"encoder.down.{count - 1}.attn.0.q.weight" in contents.tensors,
    }
    return replace(VAEConfig(), **{**stated_settings(contents, VAEConfig, overrides or {}, sizes), **sizes})
