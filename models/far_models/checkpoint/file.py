"""What a checkpoint file holds: official .pth and .ckpt files and .safetensors, read without executing anything that
is in them."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from far_runtime.errors import FarError

FAR_WEIGHTS = ("model_ema", "model", "state_dict")  # the first that the file has, where none is asked for
VAE_WEIGHTS = ("model", "state_dict", "model_ema")  # kl16.ckpt has "model", files of LDM's trainer "state_dict"
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name


@dataclass(frozen=True)
class Contents:
    """What a file holds: tensors by official name, the training arguments (official `args`), the metadata (of a
    .safetensors file, or the entry of that name that this project's trainers write), and the name of the state dict
    that was taken, empty where the file is one itself."""

    path: Path
    tensors: dict[str, Tensor]
    args: dict[str, Any]
    metadata: dict[str, str]
    weights: str = ""


def read_contents(path: Path, weights: str | None = None, order: Sequence[str] = FAR_WEIGHTS) -> Contents:
    """Tensors, arguments and metadata of a checkpoint file; `weights` names the state dict to take where the file
    holds several, and without it the first of `order` is taken.

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
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    args = dict(arguments) if isinstance(arguments, Mapping) else {}
    notes = state.get("metadata")
    metadata = {str(k): str(v) for k, v in notes.items()} if isinstance(notes, Mapping) else {}
    taken, chosen = _chosen(path, state, weights, order)
    return Contents(path, _tensors(path, chosen), args, metadata, taken)


def _read_safetensors(path: Path) -> Contents:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it cannot be iterated
            return Contents(path, _tensors(path, tensors), {}, file.metadata() or {})
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
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError) as error:
        told = isinstance(error, (RuntimeError, OSError)) and str(error)
        detail = str(error).splitlines()[0] if told else "its content is none"
        raise FarError(f"{path}: not a PyTorch checkpoint, or cut short ({detail})") from error


def _chosen(
    path: Path, state: dict[Any, Any], weights: str | None, order: Sequence[str]
) -> tuple[str, Mapping[Any, Any]]:
    """The state dict to take and its name; the file's dictionary itself, named "", where it holds no state dicts."""
    candidates = {name: state[name] for name in order if isinstance(state.get(name), Mapping)}
    if not candidates:
        return "", state
    if weights is None:
        weights = next(iter(candidates))
    if weights not in candidates:
        raise FarError(
            f"{path}: no weights called {weights!r}; the file has {', '.join(candidates)}; choose with --weights"
        )
    return weights, candidates[weights]


def _tensors(path: Path, chosen: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict without a wrapper's prefix; FarError where there is none or one is not dense."""
    tensors = {name: value for name, value in chosen.items() if isinstance(value, Tensor)}
    if not tensors:
        raise FarError(f"{path}: no tensors found; expected a state dict, or one under model_ema or model")
    for name, tensor in tensors.items():
        kind = _unusual(tensor)
        if kind:
            shape = "" if tensor.is_nested else f" {list(tensor.shape)}"
            raise FarError(
                f"{path}: tensor {name}{shape} is {kind}; expected dense floating-point tensors: save it again as such"
            )
        if not isinstance(name, str):
            raise FarError(
                f"{path}: the name of tensor {name!r} {list(tensor.shape)} is of type {type(name).__name__}; expected "
                "the official names of a state dict"
            )
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in tensors)), ""):
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return tensors


def _unusual(tensor: Tensor) -> str:
    """What makes a tensor no plain array of values, or nothing."""
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return "sparse"
    return "without values (meta)" if tensor.is_meta else ""
