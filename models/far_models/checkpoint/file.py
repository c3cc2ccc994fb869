"""The contents of checkpoint files: official .pth and .ckpt files and .safetensors, read without running any code in
them."""

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

FAR_WEIGHTS = ("model_ema", "model", "state_dict")
"""Names of state dicts inside a file, in the order in which they are preferred."""
VAE_WEIGHTS = ("model", "state_dict", "model_ema")
"""The same for a VAE: kl16.ckpt has "model", files of LDM's trainer have "state_dict"."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to every name."""


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint file."""

    path: Path
    tensors: dict[str, Tensor]
    """The tensors of the chosen state dict, by official name."""
    args: dict[str, Any]
    """The training arguments (official `args`)."""
    metadata: dict[str, str]
    """The metadata of a .safetensors file, or the entry "metadata" that this project's trainers write."""
    weights: str = ""
    """Name of the chosen state dict; "" where the file is a state dict itself."""


def read_contents(path: Path, weights: str | None = None, order: Sequence[str] = FAR_WEIGHTS) -> Contents:
    """Read tensors, arguments and metadata of a checkpoint file.

    weights: the state dict to choose where the file has several; by default the first of `order`.

    Only tensors, plain values and an argparse.Namespace are unpickled. Tensors stay memory-mapped where the format
    allows. Raises FarError for a missing file, a file that is not a checkpoint, and a pickle with anything else in it.
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
    entries = state.get("metadata")
    metadata = {str(key): str(value) for key, value in entries.items()} if isinstance(entries, Mapping) else {}
    name, state_dict = _choose_state_dict(path, state, weights, order)
    return Contents(path=path, tensors=_tensors(path, state_dict), args=args, metadata=metadata, weights=name)


def _read_safetensors(path: Path) -> Contents:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it cannot be iterated
            return Contents(path=path, tensors=_tensors(path, tensors), args={}, metadata=file.metadata() or {})
    except SafetensorError as error:
        raise FarError(f"{path}: not a safetensors file ({error}); is the download complete?") from error


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # Warnings of pickle protocols do not help with a wrong file.
            warnings.simplefilter("ignore")
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
        has_reason = isinstance(error, (RuntimeError, OSError)) and str(error)
        detail = str(error).splitlines()[0] if has_reason else "its content is none"
        raise FarError(f"{path}: not a PyTorch checkpoint, or cut short ({detail})") from error


def _choose_state_dict(
    path: Path, state: dict[Any, Any], weights: str | None, order: Sequence[str]
) -> tuple[str, Mapping[Any, Any]]:
    """The chosen state dict and its name; the file's own dictionary and "" where it has no state dicts inside."""
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


def _tensors(path: Path, state_dict: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without wrappers' prefixes; FarError where there are none or one is not dense."""
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    if not tensors:
        raise FarError(f"{path}: no tensors found; expected a state dict, or one under model_ema or model")
    for name, tensor in tensors.items():
        if layout := _unusual_layout(tensor):
            shape = "" if tensor.is_nested else f" {list(tensor.shape)}"
            raise FarError(
                f"{path}: tensor {name}{shape} is {layout}; expected dense floating-point tensors: save it again as "
                "such"
            )
        if not isinstance(name, str):
            raise FarError(
                f"{path}: the name of tensor {name!r} {list(tensor.shape)} is of type {type(name).__name__}; expected "
                "the official names of a state dict"
            )
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in tensors)), ""):
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return tensors


def _unusual_layout(tensor: Tensor) -> str:
    """How a tensor is stored where it is not a dense array of values; else ""."""
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return "sparse"
    return "without values (meta)" if tensor.is_meta else ""
