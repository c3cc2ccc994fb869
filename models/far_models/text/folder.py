"""A text encoder's Hugging Face folder: configuration and weights, read without running any code in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from far_models.checkpoint.file import read_contents
from far_runtime.errors import FarError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; FarError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FarError(f"{path}: cannot be read as JSON ({error}); download the text encoder's folder again") from error
    if not isinstance(content, dict):
        raise FarError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The entries of config.json; those of a nested language model (`text_config`) override the others."""
    path = folder / "config.json"
    if not path.is_file():
        raise FarError(f"{folder}: no config.json; give --text-encoder the Hugging Face folder of a text encoder")
    config = read_json(path)
    text_config = config.get("text_config")
    if not isinstance(text_config, dict):
        return config
    return {**config, **text_config, "model_type": config.get("model_type")}


def setting(
    config: Mapping[str, Any], path: Path, name: str, number_type: Callable[[Any], Any], default: Any = None
) -> Any:
    """A number above 0 in config.json; FarError for another value, and where it is missing and has no default."""
    value = config.get(name)
    if value is None:
        value = default
    try:
        if value is None or isinstance(value, bool) or not number_type(value) > 0 or number_type(value) != value:
            raise ValueError
        return number_type(value)
    except (TypeError, ValueError):
        raise FarError(f"{path / 'config.json'}: {name} is {value!r}; expected a number above 0") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder by name: one .safetensors file, several with an index, or pytorch_model.bin."""
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise FarError(f"{folder}: no weights; expected {' or '.join(WEIGHTS)} in it")
    if not name.endswith(".json"):
        return read_contents(folder / name).tensors
    index = read_json(folder / name).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise FarError(f"{folder / name}: has no weight_map; download the text encoder's folder again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted({str(shard) for shard in index.values()}):
        if Path(shard).name != shard:
            raise FarError(f"{folder / name}: names {shard!r}, which is outside the folder; do not use this folder")
        tensors |= read_contents(folder / shard).tensors
    missing = [name for name in index if name not in tensors]
    if missing:
        raise FarError(f"{folder / name}: {missing[0]} and {len(missing) - 1} more are in none of its files")
    return tensors


def without_prefix(
    folder: Path, tensors: Mapping[str, Tensor], marker: str, ignored: tuple[str, ...]
) -> dict[str, Tensor]:
    """The tensors of the text encoder without the prefix of their names ("bert.", "model."), if there is one.

    marker: a tensor that every such network has, by which the prefix is found.
    ignored: beginnings of the names of tensors beside the network, such as a head or a picture encoder.

    Raises FarError where there is no tensor called `marker`.
    """
    prefix = next((name[: -len(marker)] for name in tensors if name == marker or name.endswith("." + marker)), None)
    if prefix is None:
        raise FarError(
            f"{folder}: no tensor called {marker} in its weights; expected the network that its config.json describes"
        )
    inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in inside.items() if not name.startswith(ignored)}
