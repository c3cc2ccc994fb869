"""The subject of a picture: a class label or a prompt.

Commands import this module for their help texts, so NumPy is imported where it is used.
"""

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
"""The prompts that are drawn if the user gives none."""


@dataclass(frozen=True)
class Subject:
    """What one picture shows."""

    label: int | None
    """Number of its class; None for a prompt."""
    name: str = ""
    """Name of its class, or the prompt."""
    negative: str = ""
    """The prompt that guidance leads away from; "" for the learned null condition."""

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
    """The subjects of labels (numbers or names) or of prompts, whichever the bundle draws from.

    Raises FarError for the others, and for a label that is out of range, unknown or ambiguous.
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
    """The subject without a condition: the null class, which training drops labels to, or no prompt."""
    if takes_text(manifest):
        return Subject(None, "", negative)
    return Subject(manifest.model.classes, "no class")


def is_null(manifest: Manifest, subject: Subject) -> bool:
    """Whether guidance leads nowhere: for the null class, or where there is neither a prompt nor a negative prompt."""
    if takes_text(manifest):
        return not subject.name.strip() and not subject.negative.strip()
    return subject.label == manifest.model.classes


def default_subjects(manifest: Manifest, count: int) -> list[Subject]:
    """The first classes or example prompts, at most `count`; an empty prompt for a bundle without a text encoder."""
    if takes_text(manifest):
        return resolve_subjects(manifest, prompts=EXAMPLES[:count] if manifest.has_stage("text") else [""])
    return resolve_subjects(manifest, range(min(count, manifest.model.classes)))


def spread_subjects(manifest: Manifest, count: int) -> list[Subject]:
    """Subjects for `count` pictures: classes spread evenly over all of them, or the example prompts in turn."""
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
    """The condition of a batch of subjects, and warnings of prompts that were cut.

    features: the features [T, width] of every text, where they were computed before.
    """
    manifest = bundle.manifest
    if takes_text(manifest):
        from far_runtime.conditioning.text import text_condition

        return text_condition(engine, bundle, subjects, features)
    from far_runtime.sampling.base import label_condition

    return label_condition(engine, [subject.label or 0 for subject in subjects], manifest.model.classes), ()
