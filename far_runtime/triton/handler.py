"""Requests that Triton hands to the loop together: drawn together where they can be, each answered for itself."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from far_runtime.conditioning.subjects import takes_text
from far_runtime.errors import FarError
from far_runtime.generation import Generation, Progress
from far_runtime.pipeline import Pipeline
from far_runtime.triton.engine import StageFailed
from far_runtime.triton.requests import Wanted, wanted_of

Picture = tuple[NDArray[np.uint8], str]
"""Pixels [H, W, 3], and what they were made with as JSON."""


class Cancelled(Exception):
    """Nobody waits for any picture of the batch any longer."""


class Drawer:
    """Answers requests with a pipeline. utils: the module triton_python_backend_utils."""

    def __init__(self, pipeline: Pipeline, utils: Any) -> None:
        self._pipeline, self._utils = pipeline, utils
        text = takes_text(pipeline.bundle.manifest)
        self._inputs = (("PROMPT", "NEGATIVE") if text else ("LABEL",)) + ("SEED", "SAMPLING")

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """A response for every request, in their order: its pictures, or what is wrong with it."""
        failed: dict[int, Exception] = {}
        batches: dict[Hashable, list[Wanted]] = {}
        for i, request in enumerate(requests):
            try:
                wanted = wanted_of(self._pipeline.bundle.manifest, i, self._read(request))
            except FarError as error:
                failed[i] = error
                continue
            for one in wanted:
                batches.setdefault(one.kind, []).append(one)
        drawn: dict[tuple[int, int], Picture] = {}
        for batch in batches.values():
            pictures, errors = self._drawn(batch, requests)
            drawn |= pictures
            failed |= errors
        answers = []
        for i, request in enumerate(requests):
            pictures_of = [drawn[place] for place in sorted(drawn) if place[0] == i]
            answers.append(self._error(failed[i]) if i in failed else self._response(request, pictures_of))
        return answers

    def _read(self, request: Any) -> dict[str, list[Any]]:
        """The request's inputs by name, a value a picture [B, 1]."""
        tensors = {name: self._utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        return {name: list(one.as_numpy().reshape(-1)) for name, one in tensors.items() if one is not None}

    def _drawn(
        self, batch: Sequence[Wanted], requests: Sequence[Any]
    ) -> tuple[dict[tuple[int, int], Picture], dict[int, Exception]]:
        """Pictures of one kind by their place, and by request what went wrong."""
        of = list(dict.fromkeys(one.place[0] for one in batch))
        try:
            made = self._made(batch, [requests[i] for i in of])
        except Cancelled as error:
            return {}, dict.fromkeys(of, error)
        except Exception as error:
            if len(of) == 1:
                return {}, {of[0]: error}
            parts = [self._drawn([one for one in batch if one.place[0] == i], requests) for i in of]
            return (  # the fault may be of one request
                {place: picture for pictures, _ in parts for place, picture in pictures.items()},
                {i: failure for _, failures in parts for i, failure in failures.items()},
            )
        warnings = {"warnings": list(made.warnings)} if made.warnings else {}
        texts = [json.dumps({**settings.to_dict(), **warnings}) for settings in made.settings]
        return {one.place: (made.images[i], texts[i]) for i, one in enumerate(batch)}, {}

    def _made(self, batch: Sequence[Wanted], requests: Sequence[Any]) -> Generation:
        def on_progress(progress: Progress) -> None:
            if progress.inner == progress.step.substeps and all(request.is_cancelled() for request in requests):
                raise Cancelled

        settings = {**batch[0].settings, "guidance": [one.settings["guidance"] for one in batch]}
        return self._pipeline.generate(
            [one.subject for one in batch], [one.seed for one in batch], batch_size=len(batch),
            on_progress=on_progress, **settings,
        )  # fmt: skip

    def _response(self, request: Any, drawn: Sequence[Picture]) -> Any:
        pixels, settings = zip(*drawn, strict=True)
        arrays = {
            "PIXELS": np.stack(pixels),
            "SETTINGS": np.array([[text.encode()] for text in settings], np.object_),
        }
        names = request.requested_output_names()
        tensors = [self._utils.Tensor(name, array) for name, array in arrays.items() if name in names]
        return self._utils.InferenceResponse(output_tensors=tensors)

    def _error(self, error: Exception) -> Any:
        """A response that says what was wrong, to the client where it is the client's fault, and to the log."""
        kinds = self._utils.TritonError
        if isinstance(error, Cancelled):
            return self._failure("cancelled", kinds.CANCELLED)
        if isinstance(error, FarError) and not isinstance(error, StageFailed):
            return self._failure(str(error), kinds.INVALID_ARG)
        text = str(error) if isinstance(error, StageFailed) else f"{type(error).__name__}: {error}"
        self._utils.Logger.log_error(f"far: {text}")
        return self._failure(f"not drawn: {text}", kinds.INTERNAL)

    def _failure(self, message: str, code: Any) -> Any:
        return self._utils.InferenceResponse(output_tensors=[], error=self._utils.TritonError(message, code))
