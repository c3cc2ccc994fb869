"""What a checkpoint states about its model: sizes by the shapes of the tensors, settings by the training arguments, the
metadata and `--config`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from far_models.checkpoint.file import Contents
from far_models.far import FARConfig, grid_of
from far_runtime.errors import FarError
from far_runtime.sampling.lowpass import FILTERS
from far_runtime.sampling.noise_schedule import PREDICTIONS

ALLOWED = {"prediction": PREDICTIONS, "filter": tuple(FILTERS)}
"""Values of the settings that are strings."""
BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


def metadata_entry(contents: Contents, key: str, default: Any) -> Any:
    """A JSON entry of the metadata; FarError where it is not JSON or not of the type of `default`."""
    try:
        value = json.loads(contents.metadata.get(key, "null"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FarError(f"{contents.path}: its metadata entry {key!r} is not JSON ({error}); save it again") from error
    if value is not None and type(value) is not type(default):
        raise FarError(f"{contents.path}: its metadata entry {key!r} is no {type(default).__name__}; save it again")
    return default if value is None else value


def parse_overrides(pairs: tuple[str, ...], option: str = "--config") -> dict[str, Any]:
    """Settings from an option such as `--config`: each is NAME=VALUE (the value read as JSON, else as text) or the path
    of a JSON file."""
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


def check_setting(name: str, value: Any, annotation: str, source: str) -> Any:
    """The value of a setting in the type of its dataclass field.

    annotation: the field's annotation. source: where the value comes from, for the message. Raises FarError for a value
    of another type or out of its range.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if annotation == "bool":
        if isinstance(value, str):
            value = BOOLEANS.get(value.strip().lower(), value)
        valid, expected = isinstance(value, bool), "true or false"
    elif annotation == "int":
        smallest = 0 if name == "buffer" else 1
        valid, expected = is_integer and value >= smallest, f"a whole number from {smallest}"
    elif annotation == "float":
        is_number = (is_integer and abs(value) < 2**53) or isinstance(value, float)
        valid, expected = is_number and math.isfinite(value) and value > 0, "a finite number above 0"
    elif annotation == "str":
        valid, expected = isinstance(value, str) and value in ALLOWED[name], " or ".join(ALLOWED[name])
    else:
        value = tuple(value) if isinstance(value, (list, tuple)) else value
        valid = isinstance(value, tuple) and bool(value) and all(type(item) is int and item > 0 for item in value)
        expected = "a list of whole numbers from 1"
    if not valid:
        raise FarError(f"{source} {name}={value!r}: expected {expected}")
    return value


def stated_settings(
    contents: Contents, config_type: type, overrides: Mapping[str, Any], sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of `config_type` in the metadata and, on top, in the overrides (`--config`).

    Raises FarError for an unknown name, a value that is not allowed, and a size that differs from the tensors'.
    """
    annotations = annotations_of(config_type)
    for name in overrides:
        if name not in annotations and not (name == "heads" and config_type is FARConfig):
            raise FarError(f"--config {name}: unknown setting; known: {', '.join(sorted(annotations))}")
    metadata = {name: value for name, value in metadata_entry(contents, "config", {}).items() if name in annotations}
    settings: dict[str, Any] = {}
    for source, values in ((f"{contents.path}: metadata", metadata), ("--config", overrides)):
        for key, value in values.items():
            # FAR has two head counts, which "heads" sets both.
            both = key == "heads" and key not in annotations
            for name in ("encoder_heads", "decoder_heads") if both else (key,):
                settings[name] = value = check_setting(key, value, annotations[name], source)
                if name in sizes and not _same_size(name, value, sizes):
                    raise FarError(
                        f"{source} {name}={value!r}: the tensors of {contents.path.name} say {sizes[name]!r}; sizes "
                        "are read from them: leave it out"
                    )
    return settings


def argument_settings(contents: Contents, names: Mapping[str, str]) -> dict[str, Any]:
    """Settings that the training arguments (official `args`) state; None there means that they do not.

    names: the setting by the argument's name. Raises FarError for values that are not allowed.
    """
    args = {name: value for name, value in contents.args.items() if value is not None}
    if args.get("patch_size", 1) != 1:
        raise FarError(
            f"{contents.path}: patch_size {args['patch_size']}; the official sampler and this one know 1 only"
        )
    annotations, source = annotations_of(FARConfig), f"{contents.path}: args"
    settings = {}
    for argument, name in names.items():
        if argument in args:
            value = args[argument]
            if annotations[name] == "bool" and value in (0, 1):
                value = bool(value)
            settings[name] = check_setting(argument, value, annotations[name], source)
    return settings


def annotations_of(config_type: type) -> dict[str, str]:
    """The annotations of a dataclass's fields, by their names."""
    return {field.name: str(field.type) for field in fields(config_type)}


def _same_size(name: str, value: Any, sizes: Mapping[str, Any]) -> bool:
    # The hidden width is rounded, so that several ratios mean the same tensors.
    if name == "mlp_ratio":
        width = sizes.get("encoder_width") or sizes["width"]
        return round(width * value) == round(width * sizes[name])
    return bool(value == sizes[name])


def count_modules(contents: Contents, prefix: str) -> int:
    """The number of numbered modules in the file under a prefix such as "encoder_blocks."."""
    indices = (name[len(prefix) :].split(".")[0] for name in contents.tensors if name.startswith(prefix))
    return len({index for index in indices if index.isdecimal()})


def read_shapes(
    contents: Contents, ranks: Mapping[str, int], model_type: Callable[..., nn.Module], config: object
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that state the sizes, by name.

    ranks: the number of dimensions that each tensor has. Raises FarError that names all tensors that are missing, with
    the names in the file that no such model has, or all tensors of another rank or without values.
    """
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
    """A tensor's name without its numbers."""
    return re.sub(r"\b\d+\b", "N", name)


def far_sizes(contents: Contents, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The sizes that FAR and FAR-T2I have in common; FarError where positions or head are not such a model's."""
    width, channels = shapes["z_proj.weight"]
    positions = list(shapes["diffusion_pos_embed_learned"])
    try:
        grid = grid_of(positions[1])
    except ValueError as error:
        raise FarError(f"{contents.path}: diffusion_pos_embed_learned is {positions}: {error}") from error
    head_depth = count_modules(contents, "diffloss.net.res_blocks.")
    if not head_depth:
        raise FarError(f"{contents.path}: no tensors called diffloss.net.res_blocks.*; is this a whole FAR checkpoint?")
    return {
        "grid": grid,
        "channels": channels,
        "encoder_width": width,
        "encoder_depth": count_modules(contents, "encoder_blocks."),
        "decoder_width": shapes["decoder_embed.weight"][0],
        "decoder_depth": count_modules(contents, "decoder_blocks."),
        "head_width": shapes["diffloss.net.input_proj.weight"][0],
        "head_depth": head_depth,
    }


def autoencoder_ranks(contents: Contents) -> dict[str, int]:
    """The ranks of the tensors that `autoencoder_sizes` reads."""
    return {"encoder.conv_in.weight": 4, **dict.fromkeys(_resolutions(contents), 4)}


def autoencoder_sizes(contents: Contents, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The sizes that KL-VAE and VQ-VAE have in common; FarError where the convolutions are not such a model's."""
    ch, folded = shapes["encoder.conv_in.weight"][:2]
    patch = math.isqrt(folded // 3)
    if folded != 3 * patch * patch:
        raise FarError(
            f"{contents.path}: encoder.conv_in.weight {list(shapes['encoder.conv_in.weight'])} takes {folded} "
            "channels; expected 3 x patch^2"
        )
    resolutions = _resolutions(contents)
    for name in resolutions:
        if shapes[name][0] % ch:
            raise FarError(f"{contents.path}: {name} is {list(shapes[name])}; expected a multiple of {ch} channels")
    return {
        "ch": ch,
        "multipliers": tuple(shapes[name][0] // ch for name in resolutions),
        "blocks": count_modules(contents, "encoder.down.0.block."),
        "patch": patch,
    }


def _resolutions(contents: Contents) -> list[str]:
    """A tensor of every resolution of the encoder, from the highest to the lowest."""
    count = count_modules(contents, "encoder.down.")
    return [f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(count, 1))]
