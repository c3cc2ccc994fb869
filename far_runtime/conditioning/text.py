"""Prompts into what a text-to-image model draws under: tokens, the text encoder's features, and the context made of
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import Manifest
from far_runtime.engines.base import Array, Engine
from far_runtime.errors import FarError
from far_runtime.model_info import FarT2iInfo, TextSettings
from far_runtime.sampling.base import Condition

TOKENIZER = "tokenizer.json"
SHOWN = 40


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder's tokenizer.json, without the padding and cutting that the file may ask for.

    Raises FarError where the library `tokenizers` is not installed and where the file is missing or damaged.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise FarError(
            "prompts need the library tokenizers, which is not installed; get it with: pip install 'far-deploy[text]'"
        ) from None
    path = folder / TOKENIZER
    if not path.is_file():
        raise FarError(f"{folder}: no {TOKENIZER}; give a folder that has one (transformers' fast tokenizers save it)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise FarError(f"{path}: not a tokenizer ({error}); download it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenize(
    tokenizer: Any, settings: TextSettings, prompts: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str, ...]]:
    """Token ids and mask [B, prefix + tokens] of prompts, and a warning for each one that was cut.

    Each row is the system prompt's ids, then the prompt's, padded (mask 0) or cut to `tokens`; the tokenizer's closing
    tokens stay. As officially, a pad token within a prompt is masked too.
    """
    tokens, pad = settings.tokens, settings.pad
    rows, warnings = [], []
    for prompt in prompts:
        ids = list(tokenizer.encode(prompt).ids)
        if len(ids) > tokens:
            shown = prompt if len(prompt) <= SHOWN else prompt[:SHOWN] + "..."
            warnings.append(f"prompt {shown!r}: {len(ids)} tokens, the model reads {tokens}; the rest is cut")
            tokenizer.enable_truncation(tokens)
            ids = list(tokenizer.encode(prompt).ids)
            tokenizer.no_truncation()
        padding = [pad] * (tokens - len(ids))
        rows.append([*padding, *ids] if settings.padding_side == "left" else [*ids, *padding])
    own = np.array(rows, np.int64).reshape(-1, tokens)
    before = np.tile(np.array(settings.prefix, np.int64), (len(own), 1))
    mask = np.concatenate([np.ones_like(before), (own != pad).astype(np.int64)], axis=1)
    return np.concatenate([before, own], axis=1), mask, tuple(warnings)


def text_condition(
    engine: Engine,
    manifest: Manifest,
    folder: Path,
    prompts: Sequence[str],
    negatives: Sequence[str],
    known: Mapping[str, NDArray[np.float32]] | None = None,
) -> tuple[Condition, tuple[str, ...]]:
    """What a batch of pictures is drawn under, a prompt and a negative prompt each, and warnings of prompts that were
    cut.

    Without text a prompt is the learned null condition, and so is a negative one; every other text is encoded once, or
    not at all where the features [T, width] of all are `known`.
    Raises FarError for a bundle without a text encoder, unless no text is given.
    """
    texts = list(dict.fromkeys(text for text in (*prompts, *negatives) if text.strip()))
    warnings: tuple[str, ...] = ()
    if texts and known:
        features = engine.put(np.stack([known[text] for text in texts]))
    elif texts:
        features, warnings = encode(engine, manifest, folder, texts)
    else:
        model = text_model(manifest)
        features = engine.put(np.zeros((1, model.context_tokens, model.context_width), np.float32))
    place = {text: i for i, text in enumerate(texts)}
    return context_condition(engine, features, [place.get(p) for p in prompts], [place.get(n) for n in negatives]), (
        warnings
    )


def encode(engine: Engine, manifest: Manifest, folder: Path, texts: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """The text encoder's features [texts, T, width], and warnings of texts that were cut; FarError for a bundle without
    a text encoder."""
    check_encoder(manifest, folder)
    settings = text_model(manifest).text
    assert settings is not None  # where there is a text encoder
    ids, mask, warnings = tokenize(load_tokenizer(folder), settings, texts)
    return engine.run("text", {"ids": engine.put(ids), "mask": engine.put(mask)})["features"], warnings


def context_condition(
    engine: Engine, features: Array, own: Sequence[int | None], negative: Sequence[int | None]
) -> Condition:
    """The condition of a batch whose pictures show the texts `own` and are led away from the texts `negative`: rows of
    features [texts, T, width], or None for the learned null condition."""

    def context(rows: Sequence[int | None]) -> dict[str, Array]:
        inputs = {
            "features": features,
            "index": engine.put(np.array([row or 0 for row in rows], np.int64)),
            "null": engine.put(np.array([row is None for row in rows], np.int64)),
        }
        return {"context": engine.run("context", inputs)["context"]}

    return Condition(len(own), context(own), context([*own, *negative]))


def text_model(manifest: Manifest) -> FarT2iInfo:
    """The manifest's network, which draws from text; FarError for any other."""
    if not isinstance(manifest.model, FarT2iInfo):
        raise FarError(f"a {manifest.system} model draws from class labels, not from text; leave prompts out")
    return manifest.model


def check_encoder(manifest: Manifest, folder: Path) -> None:
    """FarError for a bundle without a text encoder."""
    if not manifest.has_stage("text") or text_model(manifest).text is None:
        raise FarError(
            f"{folder}: has no text encoder, so it takes no prompts; export it again with --text-encoder DIR"
        )
