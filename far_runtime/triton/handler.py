"""Answers the requests that Triton hands to the loop: pictures share batches if they can, and requests fail alone."""

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
from far_runtime.triton.requests import Job, parse_request

Picture = tuple[NDArray[np.uint8], str]
"""Pixels [H, W, 3], and the metadata as JSON."""

Position = tuple[int, int]
"""Which request, and which of its pictures."""


class Cancelled(Exception):
    """All requests of a batch were cancelled."""


class RequestHandler:
    """Answers requests with a pipeline; utils: the module triton_python_backend_utils."""

    def __init__(self, pipeline: Pipeline, utils: Any) -> None:
        self._pipeline, self._utils = pipeline, utils
        text = takes_text(pipeline.bundle.manifest)
        self._inputs = (("PROMPT", "NEGATIVE") if text else ("LABEL",)) + ("SEED", "SAMPLING")

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """The responses to all requests, in their order: the pictures of each, or its error."""
        errors: dict[int, Exception] = {}
        batches: dict[Hashable, list[Job]] = {}
        for i, request in enumerate(requests):
            try:
                jobs = parse_request(self._pipeline.bundle.manifest, i, self._read_inputs(request))
            except FarError as error:
                errors[i] = error
                continue
            for job in jobs:
                batches.setdefault(job.settings_key, []).append(job)
        pictures: dict[Position, Picture] = {}
        for batch in batches.values():
            batch_pictures, batch_errors = self._draw(batch, requests)
            pictures |= batch_pictures
            errors |= batch_errors
        responses = []
        for i, request in enumerate(requests):
            of_request = [pictures[position] for position in sorted(pictures) if position[0] == i]
            responses.append(self._error_response(errors[i]) if i in errors else self._response(request, of_request))
        return responses

    def _read_inputs(self, request: Any) -> dict[str, list[Any]]:
        """The request's inputs by name, one value per picture (their shapes are [B, 1])."""
        tensors = {name: self._utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        return {name: list(tensor.as_numpy().reshape(-1)) for name, tensor in tensors.items() if tensor is not None}

    def _draw(
        self, batch: Sequence[Job], requests: Sequence[Any]
    ) -> tuple[dict[Position, Picture], dict[int, Exception]]:
        """The pictures of a batch by their position, and errors by request."""
        members = list(dict.fromkeys(job.position[0] for job in batch))
        try:
            generation = self._generate(batch, [requests[i] for i in members])
        except Cancelled as error:
            return {}, dict.fromkeys(members, error)
        except Exception as error:
            if len(members) == 1:
                return {}, {members[0]: error}
            # The fault may lie in one request, which must not take the others with it.
            pictures: dict[Position, Picture] = {}
            errors: dict[int, Exception] = {}
            for i in members:
                own_pictures, own_errors = self._draw([job for job in batch if job.position[0] == i], requests)
                pictures |= own_pictures
                errors |= own_errors
            return pictures, errors
        warnings = {"warnings": list(generation.warnings)} if generation.warnings else {}
        metadata = [json.dumps({**settings.to_dict(), **warnings}) for settings in generation.settings]
        return {job.position: (generation.images[i], metadata[i]) for i, job in enumerate(batch)}, {}

    def _generate(self, batch: Sequence[Job], requests: Sequence[Any]) -> Generation:
        """The pictures of a batch; raises Cancelled at the next step of the loop when all of its requests are."""

        def on_progress(progress: Progress) -> None:
            if progress.inner == progress.step.substeps and all(request.is_cancelled() for request in requests):
                raise Cancelled

        settings = {**batch[0].settings, "guidance": [job.settings["guidance"] for job in batch]}
        return self._pipeline.generate(
            [job.subject for job in batch], [job.seed for job in batch], batch_size=len(batch),
            on_progress=on_progress, **settings,
        )  # fmt: skip

    def _response(self, request: Any, pictures: Sequence[Picture]) -> Any:
        pixels, metadata = zip(*pictures, strict=True)
        arrays = {
            "PIXELS": np.stack(pixels),
            "SETTINGS": np.array([[text.encode()] for text in metadata], np.object_),
        }
        names = request.requested_output_names()
        tensors = [self._utils.Tensor(name, array) for name, array in arrays.items() if name in names]
        return self._utils.InferenceResponse(output_tensors=tensors)

    def _error_response(self, error: Exception) -> Any:
        """A response with an error, which is also logged unless it is the client's fault."""
        codes = self._utils.TritonError
        if isinstance(error, Cancelled):
            return self._failure("cancelled", codes.CANCELLED)
        if isinstance(error, FarError) and not isinstance(error, StageFailed):
            return self._failure(str(error), codes.INVALID_ARG)
        message = str(error) if isinstance(error, StageFailed) else f"{type(error).__name__}: {error}"
        self._utils.Logger.log_error(f"far: {message}")
        return self._failure(f"not drawn: {message}", codes.INTERNAL)

    def _failure(self, message: str, code: Any) -> Any:
        return self._utils.InferenceResponse(output_tensors=[], error=self._utils.TritonError(message, code))
