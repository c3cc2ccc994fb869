"""Prompts of pictures and their features by a frozen text encoder, as training data for FAR-T2I."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from far_runtime.errors import FarError, SettingName
from far_runtime.storage.atomic import whole_folder
from far_training.data.cache import write_json
from far_training.loop.display import Log

NOTES = "text.json"


@dataclass(frozen=True)
class TextSet:
    """The prompts of pictures and their features."""

    source: Path
    """Folder of the cache."""
    encoder: str
    """Name of the text encoder's folder."""
    prompts: tuple[str, ...]
    """Distinct prompts."""
    index: NDArray[np.int64]
    """Number [N] of every picture's prompt in `prompts`."""
    features: NDArray[np.float32]
    """Features [prompts, T, width]."""


def prompts_of(pictures: PictureSet, captions: Path | None = None) -> list[str]:
    """A prompt for every picture: those of a captions file (a JSON list), if there is one.

    Otherwise "a {style} emoji of {class}" for a folder with drawing styles (scripts/zoo/prepare_emoji.py), and "a
    picture of {class}" for any other. FarError for files that do not fit the pictures.
    """
    if captions is not None:
        return read_captions(captions, len(pictures.labels))
    styles = pictures.source / "styles.npy"
    names = styles.with_suffix(".json")
    classes = [pictures.names[label] for label in pictures.labels]
    if not styles.is_file() or not names.is_file():
        return [f"a picture of {name}" for name in classes]
    numbers = load_labels(styles, len(classes))
    try:
        style_names = [str(style["style"]) for style in json.loads(names.read_text(encoding="utf-8"))]
        return [f"a {style_names[number]} emoji of {name}" for number, name in zip(numbers, classes, strict=True)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FarError(
            f"{names}: does not name the styles of {styles.name}; prepare the data again, or give ",
            SettingName("captions"),
        ) from error


def read_captions(path: Path, count: int) -> list[str]:
    """The captions of a JSON file: a list of texts, one per picture; FarError for anything else."""
    try:
        captions = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FarError(SettingName("captions"), f" {path}: cannot be read as JSON ({error})") from error
    if not isinstance(captions, list) or len(captions) != count or not all(isinstance(text, str) for text in captions):
        size = f"{len(captions)} entries" if isinstance(captions, list) else type(captions).__name__
        raise FarError(SettingName("captions"), f" {path}: {size}; expected a list of {count} texts, one per picture")
    return captions


@torch.no_grad()
def write_features(path: Path, encoder: TextEncoder, prompts: Sequence[str], batch: int, log: Log) -> None:
    """Write features [prompts, T, width] as a .npy file, a batch at a time; logs which prompts were cut."""
    tokenizer, network = load_tokenizer(encoder.folder), encoder.features
    device = next(network.parameters()).device
    with path.open("wb") as file:
        for start in range(0, len(prompts), batch):
            ids, mask, warnings = tokenize(tokenizer, encoder.settings, prompts[start : start + batch])
            for warning in warnings:
                log(warning)
            features = network(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
            values = features.float().cpu().numpy()
            if not start:
                shape = (len(prompts), *values.shape[1:])
                write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            file.write(values.tobytes())
            log(f"{min(start + batch, len(prompts))} of {len(prompts)} prompts")


def write_text_cache(
    encoder: TextEncoder, pictures: PictureSet, captions: Path | None, out: Path, batch: int, log: Log
) -> None:
    """Write features.npy [prompts, T, width], index.npy and labels.npy [N] and text.json; the folder appears whole.

    FarError if it exists already, or for an empty prompt, which is the null condition and has no features.
    """
    picture_prompts = [text.strip() for text in prompts_of(pictures, captions)]
    if "" in picture_prompts:
        number = picture_prompts.index("")
        raise FarError(f"picture {number} has an empty prompt; give every picture one (", SettingName("captions"), ")")
    prompts = list(dict.fromkeys(picture_prompts))
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    with whole_folder(out) as folder:
        write_features(folder / "features.npy", encoder, prompts, batch, log)
        np.save(folder / "index.npy", np.array([numbers[prompt] for prompt in picture_prompts], np.int64))
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
    if not np.array_equal(load_array(path / "labels.npy"), labels):
        raise FarError(f"{path}: made for other pictures than the latents'; make it again with far train cache-text")
    index = load_labels(path / "index.npy", len(labels))
    if not len(index) or index.min() < 0 or index.max() >= len(prompts):
        raise FarError(f"{path / 'index.npy'}: names prompts that are not there; make it with far train cache-text")
    return TextSet(
        source=path,
        encoder=encoder,
        prompts=prompts,
        index=index,
        features=cast("NDArray[np.float32]", features),
    )
