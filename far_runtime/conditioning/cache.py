"""What depends on a subject alone, computed once for each: a prompt's features, and the transformer's output at a first
step that sees nothing yet."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.bundle import Bundle
from far_runtime.conditioning.subjects import Subject, condition_of, null_subject, takes_text
from far_runtime.engines.base import Array, Engine
from far_runtime.errors import FarError
from far_runtime.sampling.base import FirstStep, Step
from far_runtime.sampling.settings import sampler_of

LIMIT = 256 << 20
"""Bytes that are kept: for FAR-B the first step's output of 256 classes."""


class ConditionCache:
    """Remembers for the subjects of one engine over one bundle.

    Every row is computed alone, in a batch of one: a picture's bits do not depend on what was drawn before it, nor on
    its neighbours. They are host arrays, read before a generation begins, so that it can be captured. limit: bytes that
    are kept; 0 remembers nothing, and leaves everything to the loop.
    """

    def __init__(self, engine: Engine, bundle: Bundle, limit: int = LIMIT) -> None:
        self._engine, self._bundle, self._memo = engine, bundle, LruArrays(limit)
        self._cut: dict[str, tuple[str, ...]] = {}
        self._takes_one = True

    def features(self, subjects: Sequence[Subject]) -> tuple[dict[str, NDArray[np.float32]], tuple[str, ...]]:
        """The features [T, width] of every prompt and negative prompt, by text (none for a model that takes no text),
        and warnings of texts that were cut."""
        if not self._memo.limit or not takes_text(self._bundle.manifest):
            return {}, ()
        texts = dict.fromkeys(
            text for kind in ("name", "negative") for one in subjects if (text := getattr(one, kind)).strip()
        )
        found = {text: self._memo.get(("features", text), partial(self._encode, text)) for text in texts}
        return found, tuple(warning for text in texts for warning in self._cut.get(text, ()))

    def first_output(
        self, step: Step, subjects: Sequence[Subject], features: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32] | None:
        """`Condition.first_output` of a batch for the first step of its plan: one row per picture, and their
        unconditional ones behind them where the step is guided.

        None for a system whose first step depends on more than its subject, and for an engine that takes no batch of
        one.
        """
        manifest = self._bundle.manifest
        compute: FirstStep[Any] | None = getattr(sampler_of(manifest), "first", None)
        if compute is None or not self._memo.limit or not self._takes_one:
            return None
        wanted = list(subjects)
        if step.guidance != 1:
            wanted += [self._opposite(one) for one in subjects]
        constants = json.dumps(dict(step.constants), sort_keys=True)

        def row(subject: Subject) -> NDArray[np.float32]:
            condition, _ = condition_of(self._engine, self._bundle, [subject], features)
            return self._row(compute(self._engine, manifest.model, step, condition))

        try:
            return np.stack([self._memo.get((constants, one.label, one.name), partial(row, one)) for one in wanted])
        except FarError:
            # An engine that was built for larger batches only. Whatever else it may be, the loop will run into it.
            self._takes_one = False
            return None

    def _opposite(self, subject: Subject) -> Subject:
        """What a guided picture is led away from, as a subject."""
        if takes_text(self._bundle.manifest):
            return Subject(None, subject.negative)
        return null_subject(self._bundle.manifest)

    def _encode(self, text: str) -> NDArray[np.float32]:
        from far_runtime.conditioning.text import encode

        array, warnings = encode(self._engine, self._bundle.manifest, self._bundle.path, [text])
        if warnings:
            self._cut[text] = warnings
        return self._row(array)

    def _row(self, array: Array) -> NDArray[np.float32]:
        """The one row of an array, copied while the array is there."""
        return np.array(self._engine.get(array)[0])


class LruArrays:
    """float32 arrays by key; beyond `limit` bytes, those that were not asked for longest are given up."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[Hashable, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """The array of a key, made if it is not there. Not to be written to."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            return found
        made = np.array(make())
        made.setflags(write=False)
        if made.nbytes <= self.limit and np.isfinite(made).all():  # what failed once need not fail again
            self._kept[key] = made
            self.size += made.nbytes
        while self.size > self.limit:
            self.size -= self._kept.popitem(last=False)[1].nbytes
        return made
