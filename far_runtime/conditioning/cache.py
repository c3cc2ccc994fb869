"""What depends on a subject alone and is computed once: the features of a prompt, and the transformer's output at a
first step that sees no latents yet."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import Bundle
from far_runtime.conditioning.subjects import Subject, condition_of, null_subject, takes_text, texts_of
from far_runtime.engines.base import Array, Engine, smallest_batch
from far_runtime.sampling.base import FirstStep, Step
from far_runtime.sampling.settings import sampler_of

LIMIT = 256 << 20
"""Bytes of memory, enough for the first step's output of 256 classes of FAR-B."""


class ConditionCache:
    """Text features and first outputs of the transformer, kept by subject for one engine over one bundle.

    Every row is computed alone, in a batch of one: the bits of a picture do not depend on what was drawn before it, nor
    on its neighbours. The rows are host arrays that are read before a generation begins, so that it can be captured.
    An engine that takes no batch of one leaves everything to the loop.
    """

    def __init__(self, engine: Engine, bundle: Bundle, limit: int = LIMIT) -> None:
        """The cache is empty; it keeps at most `limit` bytes, and with 0 it leaves everything to the loop."""
        self._engine, self._bundle, self._arrays = engine, bundle, LruArrays(limit)
        self._active = limit > 0 and max(smallest_batch(engine), bundle.manifest.smallest_batch) == 1
        self._warnings: dict[str, tuple[str, ...]] = {}
        self._compute_first: FirstStep[Any] | None = getattr(sampler_of(bundle.manifest), "first", None)

    def features(self, subjects: Sequence[Subject]) -> tuple[dict[str, NDArray[np.float32]], tuple[str, ...]]:
        """The features [T, width] of every prompt and negative prompt, by text, and warnings of texts that were cut.
        Nothing for a model that takes no text."""
        if not self._active or not takes_text(self._bundle.manifest):
            return {}, ()
        texts = [text for text in texts_of(subjects) if text.strip()]
        features = {text: self._arrays.get(("features", text), partial(self._encode, text)) for text in texts}
        return features, tuple(warning for text in texts for warning in self._warnings.get(text, ()))

    def first_output(
        self, step: Step, subjects: Sequence[Subject], features: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32] | None:
        """`Condition.first_output` of a batch for the first step of its plan: one row per picture, and their
        unconditional ones behind them where the step is guided.

        None for a system whose first step depends on more than its subject.
        """
        compute = self._compute_first
        if compute is None or not self._active:
            return None
        rows = list(subjects)
        if step.guidance != 1:
            rows += [self._opposite(subject) for subject in subjects]
        constants = json.dumps(dict(step.constants), sort_keys=True)

        def row(subject: Subject) -> NDArray[np.float32]:
            condition, _ = condition_of(self._engine, self._bundle, [subject], features)
            return self._row(compute(self._engine, self._bundle.manifest.model, step, condition))

        keys = [(constants, subject.label, subject.name) for subject in rows]
        return np.stack([self._arrays.get(key, partial(row, subject)) for key, subject in zip(keys, rows, strict=True)])

    def _opposite(self, subject: Subject) -> Subject:
        """The subject that guidance leads a picture away from."""
        if takes_text(self._bundle.manifest):
            return Subject(None, subject.negative)
        return null_subject(self._bundle.manifest)

    def _encode(self, text: str) -> NDArray[np.float32]:
        from far_runtime.conditioning.text import encode

        array, warnings = encode(self._engine, self._bundle.manifest, self._bundle.path, [text])
        if warnings:
            self._warnings[text] = warnings
        return self._row(array)

    def _row(self, array: Array) -> NDArray[np.float32]:
        """The only row of an array, copied while the engine still holds the array."""
        return np.array(self._engine.get(array)[0])


class LruArrays:
    """float32 arrays by key, of which those that were not asked for longest give way to new ones."""

    def __init__(self, limit: int) -> None:
        """Without any array; together they take at most `limit` bytes."""
        self.limit, self.size = limit, 0
        self._arrays: OrderedDict[Hashable, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._arrays)

    def get(self, key: Hashable, compute: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """The array of a key, computed if it is not there. It cannot be written to."""
        if key in self._arrays:
            self._arrays.move_to_end(key)
            return self._arrays[key]
        array = np.array(compute())
        array.setflags(write=False)
        # What is not finite may be right the next time.
        if array.nbytes <= self.limit and np.isfinite(array).all():
            self._arrays[key] = array
            self.size += array.nbytes
        while self.size > self.limit:
            self.size -= self._arrays.popitem(last=False)[1].nbytes
        return array
