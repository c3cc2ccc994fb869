"""The condition of a text-to-image model: prompts to tokens, tokens to the text encoder's features, and features to
the context of the transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import Bundle, Manifest
from far_runtime.conditioning.subjects import Subject, texts_of
from far_runtime.engines.base import Array, Engine
from far_runtime.errors import FarError
from far_runtime.model_info import FarT2iInfo, TextSettings
from far_runtime.sampling.base import Condition

TOKENIZER = "tokenizer.json"
SHOWN = 40
"""Characters of a prompt in a message."""


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
    """Token ids and mask [B, prefix + tokens] of prompts, and a warning for each prompt that was cut.

    Each row has the ids of the system prompt, then those of the prompt, padded (mask 0) or cut to `settings.tokens`;
    the tokenizer's closing tokens stay. As in the official code, a pad token within a prompt is masked too.
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
    prompt_ids = np.array(rows, np.int64).reshape(-1, tokens)
    prefix = np.tile(np.array(settings.prefix, np.int64), (len(prompt_ids), 1))
    mask = np.concatenate([np.ones_like(prefix), (prompt_ids != pad).astype(np.int64)], axis=1)
    return np.concatenate([prefix, prompt_ids], axis=1), mask, tuple(warnings)


def text_condition(
    engine: Engine,
    bundle: Bundle,
    subjects: Sequence[Subject],
    known: Mapping[str, NDArray[np.float32]] | None = None,
) -> tuple[Condition, tuple[str, ...]]:
    """The condition of a batch of prompts with their negative prompts, and warnings of texts that were cut.

    An empty prompt or negative prompt is the learned null condition. Every other text is encoded once, or not at all
    where the features [T, width] of all texts are `known`. Raises FarError for a bundle without a text encoder, unless
    all prompts are empty.
    """
    texts = [text for text in texts_of(subjects) if text.strip()]
    warnings: tuple[str, ...] = ()
    if texts and known:
        features = engine.put(np.stack([known[text] for text in texts]))
    elif texts:
        features, warnings = encode(engine, bundle.manifest, bundle.path, texts)
    else:
        model = text_model(bundle.manifest)
        features = engine.put(np.zeros((1, model.context_tokens, model.context_width), np.float32))
    index = {text: i for i, text in enumerate(texts)}
    prompts, negatives = (
        [index.get(text) for text in column] for column in zip(*((s.name, s.negative) for s in subjects), strict=True)
    )
    return context_condition(engine, features, prompts, negatives), warnings


def encode(engine: Engine, manifest: Manifest, folder: Path, texts: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """The text encoder's features [texts, T, width], and warnings of texts that were cut.

    Raises FarError for a bundle without a text encoder.
    """
    check_encoder(manifest, folder)
    settings = text_model(manifest).text
    assert settings is not None  # where there is a text encoder
    ids, mask, warnings = tokenize(load_tokenizer(folder), settings, texts)
    return engine.run("text", {"ids": engine.put(ids), "mask": engine.put(mask)})["features"], warnings


def context_condition(
    engine: Engine, features: Array, prompts: Sequence[int | None], negatives: Sequence[int | None]
) -> Condition:
    """The condition of a batch from the features [texts, T, width] of its texts.

    Every picture has the number of its prompt's text and of its negative prompt's; None is the learned null condition.
    """

    def context(rows: Sequence[int | None]) -> dict[str, Array]:
        inputs = {
            "features": features,
            "index": engine.put(np.array([row or 0 for row in rows], np.int64)),
            "null": engine.put(np.array([row is None for row in rows], np.int64)),
        }
        return {"context": engine.run("context", inputs)["context"]}

    return Condition(batch=len(prompts), cond=context(prompts), cond_uncond=context([*prompts, *negatives]))


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
