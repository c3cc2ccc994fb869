"""How a text encoder turns prompts into tokens: the settings that the runtime needs beside tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from far_models.text.folder import read_json
from far_runtime.conditioning.text import load_tokenizer
from far_runtime.errors import FarError
from far_runtime.model_info import TextSettings

QWEN_SYSTEM_PROMPT = """\
Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for image \
generation.

    Examples:
    - User Prompt: A cat sleeping -> A small, fluffy white cat curled up in a round shape, sleeping peacefully on a \
warm sunny windowsill, surrounded by pots of blooming red flowers.
     - User Prompt: A busy city street -> A bustling city street scene at dusk, featuring glowing street lamps, a \
diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.

    Please generate only the enhanced description for the prompt below and DO NOT include any additional sentences. \
Start your response with "Enhanced Prompt:".

    User Prompt:
"""
"""The text before every prompt in FAR-T2I's training, letter for letter (official main_far_t2i.py)."""


def text_settings(
    folder: Path, config: Mapping[str, Any], vocabulary: int, tokens: int, system_prompt: str = ""
) -> TextSettings:
    """How the tokenizer of a folder turns prompts into token ids, `tokens` for each prompt.

    Raises FarError for a folder without tokenizer.json or a padding token, and for a tokenizer with more token ids than
    the network has embeddings.
    """
    tokenizer = load_tokenizer(folder)
    tokenizer_config = _tokenizer_config(folder)
    if tokenizer.get_vocab_size() > vocabulary:
        raise FarError(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, the network embeddings of "
            f"{vocabulary}; the two are not of the same model"
        )
    special = tokenizer.num_special_tokens_to_add(False)
    if tokens <= special:
        raise FarError(
            f"{folder}: its tokenizer adds {special} tokens to every text, the checkpoint reads {tokens} in all; use "
            "the text encoder that the checkpoint was trained with"
        )
    return TextSettings(
        tokens=tokens,
        prefix=tuple(tokenizer.encode(system_prompt).ids) if system_prompt else (),
        system_prompt=system_prompt,
        pad=_padding(folder, config, vocabulary, tokenizer),
        padding_side="left" if tokenizer_config.get("padding_side") == "left" else "right",
    )


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """The entries of tokenizer_config.json; none where there is no such file."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _padding(folder: Path, config: Mapping[str, Any], vocabulary: int, tokenizer: Any) -> int:
    """The id of the padding token."""
    token = _tokenizer_config(folder).get("pad_token")
    if isinstance(token, dict):
        token = token.get("content")
    number = tokenizer.token_to_id(token) if isinstance(token, str) else config.get("pad_token_id")
    if not isinstance(number, int) or not 0 <= number < vocabulary:
        raise FarError(
            f"{folder}: neither tokenizer_config.json nor config.json names a padding token that the tokenizer has; "
            "add pad_token to tokenizer_config.json"
        )
    return number
