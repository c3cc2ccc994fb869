"""Prompts of pictures and their features by a frozen text encoder, as training data for FAR-T2I."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from far_models.pictures import PictureSet, load_array, load_labels
from far_models.text.encoder import TextEncoder
from far_runtime.conditioning.text import load_tokenizer, tokenize
from far_runtime.errors import FarError
from far_training.data.cache import new_folder, write_json

NOTES = "text.json"


@dataclass(frozen=True)
class TextSet:
    """Features [prompts, T, width] of distinct prompts, and the prompt of every picture: index [N]. encoder: the name
    of the text encoder's folder."""

    source: Path
    encoder: str
    prompts: tuple[str, ...]
    index: NDArray[np.int64]
    features: NDArray[np.float32]


def prompts_of(pictures: PictureSet, captions: Path | None = None) -> list[str]:
    """A prompt for every picture: those of a captions file (a JSON list), else "a {style} emoji of {class}" for a
    folder with drawing styles (scripts/zoo/prepare_emoji.py), else "a picture of {class}"."""
    if captions is not None:
        return read_captions(captions, len(pictures.labels))
    styles = pictures.source / "styles.npy"
    named = [pictures.names[label] for label in pictures.labels]
    if not styles.is_file() or not styles.with_suffix(".json").is_file():
        return [f"a picture of {name}" for name in named]
    numbers = load_labels(styles, len(named))
    try:
        known = [str(style["style"]) for style in json.loads(styles.with_suffix(".json").read_text(encoding="utf-8"))]
        return [f"a {known[number]} emoji of {name}" for number, name in zip(numbers, named, strict=True)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FarError(
            f"{styles.with_suffix('.json')}: does not name the styles of {styles.name}; prepare the data again, or "
            "give --captions"
        ) from error


def read_captions(path: Path, count: int) -> list[str]:
    """The captions of a JSON file: a list of texts, one per picture; FarError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FarError(f"--captions {path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, list) or len(found) != count or not all(isinstance(text, str) for text in found):
        size = f"{len(found)} entries" if isinstance(found, list) else type(found).__name__
        raise FarError(f"--captions {path}: {size}; expected a list of {count} texts, one per picture")
    return found


@torch.no_grad()
def write_features(
    path: Path, encoder: TextEncoder, prompts: Sequence[str], batch: int, say: Callable[[str], None]
) -> None:
    """Write features [prompts, T, width] as a .npy file, a batch at a time; says which prompts were cut."""
    tokenizer, features = load_tokenizer(encoder.folder), encoder.features
    device = next(features.parameters()).device
    with path.open("wb") as file:
        for start in range(0, len(prompts), batch):
            ids, mask, warnings = tokenize(tokenizer, encoder.settings, prompts[start : start + batch])
            for warning in warnings:
                say(warning)
            found = features(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)).float().cpu().numpy()
            if not start:
                shape = (len(prompts), *found.shape[1:])
                write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            file.write(found.tobytes())
            say(f"{min(start + batch, len(prompts))} of {len(prompts)} prompts")


def write_text_cache(
    encoder: TextEncoder,
    pictures: PictureSet,
    captions: Path | None,
    out: Path,
    batch: int,
    say: Callable[[str], None],
) -> None:
    """Write features.npy [prompts, T, width], index.npy and labels.npy [N] and text.json; the folder appears whole.
    FarError if it exists already, or for an empty prompt (the null condition, which has no features)."""
    each = [text.strip() for text in prompts_of(pictures, captions)]
    if "" in each:
        raise FarError(f"picture {each.index('')} has an empty prompt; give every picture one (--captions)")
    prompts = list(dict.fromkeys(each))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    with new_folder(out) as folder:
        write_features(folder / "features.npy", encoder, prompts, batch, say)
        np.save(folder / "index.npy", np.array([place[prompt] for prompt in each], np.int64))
        np.save(folder / "labels.npy", pictures.labels)
        notes = {"encoder": encoder.folder.name, "pictures": pictures.source.name, "prompts": prompts}
        write_json(folder / NOTES, notes)


def open_text_cache(path: Path, labels: NDArray[np.int64]) -> TextSet:
    """Open a folder that `write_text_cache` wrote for the pictures with these labels; FarError otherwise."""
    try:
        notes = json.loads((path / NOTES).read_text(encoding="utf-8"))
        prompts, encoder = tuple(map(str, notes["prompts"])), str(notes["encoder"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FarError(f"{path}: lacks a readable {NOTES}; make it with far train cache-text") from error
    features = load_array(path / "features.npy")
    if features.ndim != 3 or len(features) != len(prompts) or features.dtype != np.float32:
        raise FarError(
            f"{path / 'features.npy'}: {features.dtype} {list(features.shape)}; expected float32 [{len(prompts)}, "
            "tokens, width]"
        )
    theirs = load_array(path / "labels.npy")
    if not np.array_equal(theirs, labels):
        raise FarError(f"{path}: made for other pictures than the latents'; make it again with far train cache-text")
    index = load_labels(path / "index.npy", len(labels))
    if not len(index) or index.min() < 0 or index.max() >= len(prompts):
        raise FarError(f"{path / 'index.npy'}: names prompts that are not there; make it with far train cache-text")
    return TextSet(path, encoder, prompts, index, cast("NDArray[np.float32]", features))
