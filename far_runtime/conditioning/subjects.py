"""What pictures show: a class label or a prompt each. Help needs this module and answers at once, so NumPy is imported
where it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from far_runtime.bundle import Bundle, Manifest
from far_runtime.conditioning.labels import resolve_label
from far_runtime.errors import FarError, SettingName

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from far_runtime.engines.base import Engine
    from far_runtime.sampling.base import Condition

EXAMPLES = ("a red apple", "a smiling face")
"""Prompts where none are given."""


@dataclass(frozen=True)
class Subject:
    """What one picture shows. label: its class, or None with a prompt. name: the class's name, or the prompt.
    negative: the prompt that guidance leads away from ("": no text at all)."""

    label: int | None
    name: str = ""
    negative: str = ""

    @property
    def caption(self) -> str:
        """The label with its name, or the prompt."""
        return self.name if self.label is None else f"{self.label} {self.name}".strip()


def takes_text(manifest: Manifest) -> bool:
    """Whether the bundle draws from prompts, not from labels."""
    return manifest.model.takes_text


def resolve_subjects(
    manifest: Manifest, labels: Sequence[int | str] = (), prompts: Sequence[str] = (), negative: str = ""
) -> list[Subject]:
    """Subjects from labels by number or name, or from prompts, whichever the bundle draws from.

    FarError for the other kind, and for a label that is out of range, unknown or ambiguous.
    """
    if takes_text(manifest):
        if labels:
            raise FarError(
                "this bundle draws from text, not from labels; use ",
                SettingName("prompt"),
                " TEXT in place of ",
                SettingName("label"),
            )
        return [Subject(None, prompt, negative) for prompt in prompts]
    if prompts or negative:
        raise FarError(
            "this bundle draws from class labels, not from text; use ",
            SettingName("label"),
            " in place of ",
            SettingName("prompt" if prompts else "negative"),
        )
    return [subject_of(manifest, resolve_label(label, manifest.model.classes, manifest.classes)) for label in labels]


def subject_of(manifest: Manifest, label: int) -> Subject:
    """The subject of a class."""
    return Subject(label, manifest.classes[label] if manifest.classes else "")


def null_subject(manifest: Manifest, negative: str = "") -> Subject:
    """No class in particular (the class behind the last, which training drops labels to), or no text."""
    if takes_text(manifest):
        return Subject(None, "", negative)
    return Subject(manifest.model.classes, "no class")


def is_null(manifest: Manifest, subject: Subject) -> bool:
    """Whether guidance would lead a subject away from itself: no class, or neither a prompt nor a negative one."""
    if takes_text(manifest):
        return not subject.name.strip() and not subject.negative.strip()
    return subject.label == manifest.model.classes


def default_subjects(manifest: Manifest, count: int) -> list[Subject]:
    """The first classes, at most `count` of them, or example prompts; no prompt where no text encoder is there."""
    if takes_text(manifest):
        encodes = manifest.has_stage("text")
        return resolve_subjects(manifest, prompts=EXAMPLES[:count] if encodes else [""])
    return resolve_subjects(manifest, range(min(count, manifest.model.classes)))


def spread_subjects(manifest: Manifest, count: int) -> list[Subject]:
    """Subjects of `count` pictures: classes evenly spread over all there are, or the example prompts in turn."""
    if takes_text(manifest):
        prompts = default_subjects(manifest, count)
        return [prompts[i % len(prompts)] for i in range(count)]
    classes = manifest.model.classes
    return resolve_subjects(manifest, [i * classes // count if count < classes else i % classes for i in range(count)])


def texts_of(subjects: Sequence[Subject]) -> list[str]:
    """The different prompts of subjects, then their negative prompts; none for classes."""
    prompts = [subject for subject in subjects if subject.label is None]
    return list(dict.fromkeys([subject.name for subject in prompts] + [subject.negative for subject in prompts]))


def condition_of(
    engine: Engine,
    bundle: Bundle,
    subjects: Sequence[Subject],
    features: Mapping[str, NDArray[np.float32]] | None = None,
) -> tuple[Condition, tuple[str, ...]]:
    """What the loop draws these subjects under, and warnings (a prompt that was cut). features: of every text, where
    they were computed before."""
    manifest = bundle.manifest
    if takes_text(manifest):
        from far_runtime.conditioning.text import text_condition

        prompts, negatives = ([getattr(one, name) for one in subjects] for name in ("name", "negative"))
        condition, warnings = text_condition(engine, manifest, bundle.path, prompts, negatives, features)
        return condition, tuple(warnings)
    from far_runtime.sampling.base import label_condition

    return label_condition(engine, [one.label or 0 for one in subjects], manifest.model.classes), ()
