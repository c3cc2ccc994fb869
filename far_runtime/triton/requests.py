"""What a request to the loop asks for."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from far_runtime.bundle import Manifest
from far_runtime.conditioning.subjects import Subject, resolve_subjects, takes_text
from far_runtime.errors import FarError
from far_runtime.sampling.noise import random_seed
from far_runtime.sampling.settings import batch_key, resolve_plan

MAX_TEXT = 1000
"""Characters of a prompt or label."""

MAX_SAMPLING = 10_000
"""Characters of the sampling settings."""


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    position: tuple[int, int]
    """Which request, and which of its pictures."""

    subject: Subject
    """What it shows."""

    seed: int
    """Seed of its noise."""

    settings: dict[str, Any]
    """Resolved sampling settings."""

    settings_key: Hashable
    """Equal for settings that may share a batch."""


def parse_request(manifest: Manifest, request: int, inputs: Mapping[str, Sequence[Any]]) -> list[Job]:
    """The pictures of a request, from its inputs by name with one value per picture.

    request: the number of the request.
    Raises FarError for invalid inputs.
    """
    reads_text = takes_text(manifest)
    subject_input = "PROMPT" if reads_text else "LABEL"
    jobs: list[Job] = []
    for i, subject_value in enumerate(inputs[subject_input]):
        row = {name: values[i] for name, values in inputs.items()}
        name = decode_text(subject_input, subject_value, MAX_TEXT)
        negative = decode_text("NEGATIVE", row.get("NEGATIVE", b""), MAX_TEXT)
        seed = int(row["SEED"]) if "SEED" in row else random_seed()
        requested = parse_sampling(decode_text("SAMPLING", row.get("SAMPLING", b""), MAX_SAMPLING))
        labels, prompts = ([], [name]) if reads_text else ([name], [])
        subject = resolve_subjects(manifest, labels, prompts, negative)[0]
        settings, plan = resolve_plan(manifest, requested)
        job = Job(
            position=(request, i),
            subject=subject,
            seed=seed,
            settings=settings,
            settings_key=batch_key(settings, plan),
        )
        jobs.append(job)
    return jobs


def decode_text(name: str, value: Any, max_length: int) -> str:
    """The text in an element of a TYPE_STRING tensor; raises FarError unless it is UTF-8 of at most max_length
    characters."""
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise FarError(f"{name}: not UTF-8; send text in it") from error
    if len(text) > max_length:
        raise FarError(f"{name}: {len(text)} characters; send at most {max_length}")
    return text


def parse_sampling(text: str) -> dict[str, Any]:
    """Sampling settings from a JSON object, by the names of `far generate`'s options with _ for -; {} for ""."""
    if not text.strip():
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FarError(f'SAMPLING: not JSON ({error}); send an object, as {{"steps": 10}}') from error
    if not isinstance(settings, dict):
        raise FarError('SAMPLING: expected an object of settings by name, as {"steps": 10}')
    return settings
