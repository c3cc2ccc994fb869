"""A text encoder's Hugging Face folder: configuration and weights, read without executing anything that is in it."""

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
    """config.json; where it nests the language model's part (`text_config`), with that part's entries on top."""
    path = folder / "config.json"
    if not path.is_file():
        raise FarError(f"{folder}: no config.json; give --text-encoder the Hugging Face folder of a text encoder")
    config = read_json(path)
    inner = config.get("text_config")
    return {**config, **inner, "model_type": config.get("model_type")} if isinstance(inner, dict) else config


def setting(config: Mapping[str, Any], path: Path, name: str, kind: Callable[[Any], Any], default: Any = None) -> Any:
    """A number of config.json; FarError where it is missing without a default, or no such number."""
    value = config.get(name)
    if value is None:
        value = default
    try:
        if value is None or isinstance(value, bool) or not kind(value) > 0 or kind(value) != value:
            raise ValueError
        return kind(value)
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
    lost = [name for name in index if name not in tensors]
    if lost:
        raise FarError(f"{folder / name}: {lost[0]} and {len(lost) - 1} more are in none of its files")
    return tensors


def without_prefix(
    folder: Path, tensors: Mapping[str, Tensor], sign: str, ignored: tuple[str, ...]
) -> dict[str, Tensor]:
    """The tensors of the network whose tensor `sign` may stand under a prefix ("bert.", "model."), without it.

    What stands beside the network (a head, a picture encoder) and what begins with one of `ignored` is left out. Raises
    FarError where there is no such tensor.
    """
    prefix = next((name[: -len(sign)] for name in tensors if name == sign or name.endswith("." + sign)), None)
    if prefix is None:
        raise FarError(
            f"{folder}: no tensor called {sign} in its weights; expected those that its config.json tells of"
        )
    inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in inside.items() if not name.startswith(ignored)}
