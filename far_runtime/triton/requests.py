"""What a request to the loop asks for."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from far_runtime.bundle import Manifest
from far_runtime.conditioning.subjects import Subject, resolve_subjects, takes_text
from far_runtime.errors import FarError, as_option, fields_for_options
from far_runtime.sampling.noise import random_seed
from far_runtime.sampling.settings import batch_key, resolve_settings

MOST_TEXT, MOST_SAMPLING = 1000, 10_000
"""Characters of a prompt or label, and of the sampling settings."""


@dataclass(frozen=True)
class Wanted:
    """A picture that is asked for. place: which of the requests, and which of its pictures. settings: resolved ones.
    kind: what the pictures of one batch have in common."""

    place: tuple[int, int]
    subject: Subject
    seed: int
    settings: dict[str, Any]
    kind: Hashable


def wanted_of(manifest: Manifest, request: int, inputs: Mapping[str, Sequence[Any]]) -> list[Wanted]:
    """The pictures of a request from its inputs by name, a value a picture; FarError for what cannot be."""
    text = takes_text(manifest)
    shown = "PROMPT" if text else "LABEL"
    found: list[Wanted] = []
    for i, raw in enumerate(inputs[shown]):
        row = {name: values[i] for name, values in inputs.items()}
        name = text_of(shown, raw, MOST_TEXT)
        negative = text_of("NEGATIVE", row.get("NEGATIVE", b""), MOST_TEXT)
        seed = int(row["SEED"]) if "SEED" in row else random_seed()
        given = sampling_of(text_of("SAMPLING", row.get("SAMPLING", b""), MOST_SAMPLING))
        with fields_for_options():
            subject = resolve_subjects(manifest, [] if text else [name], [name] if text else [], negative)[0]
            settings = resolve_settings(manifest, {key: as_option(key, value) for key, value in given.items()})
        found.append(Wanted((request, i), subject, seed, settings, batch_key(manifest, settings)))
    return found


def text_of(name: str, raw: Any, most: int) -> str:
    """An element of a TYPE_STRING tensor; FarError unless it is UTF-8 of at most so many characters."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else str(raw)
    except UnicodeDecodeError as error:
        raise FarError(f"{name}: not UTF-8; send text in it") from error
    if len(text) > most:
        raise FarError(f"{name}: {len(text)} characters; at most {most} are taken")
    return text


def sampling_of(text: str) -> dict[str, Any]:
    """Sampling settings from a JSON object, by the names of `far generate` with _ for -; "": none are given."""
    if not text.strip():
        return {}
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FarError(f'SAMPLING: not JSON ({error}); send an object, as {{"steps": 10}}') from error
    if not isinstance(given, dict):
        raise FarError('SAMPLING: expected an object of settings by name, as {"steps": 10}')
    return given
