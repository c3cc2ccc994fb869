"""What becomes of a request for pictures: it is validated, queued, waited for and answered."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException, Request

from far_runtime.conditioning.subjects import Subject, is_null
from far_runtime.errors import FarError
from far_runtime.images.metadata import PictureMetadata
from far_runtime.images.writing import picture_bytes
from far_runtime.sampling.base import Plan
from far_runtime.sampling.noise import random_seed
from far_runtime.sampling.settings import batch_key
from far_runtime.serve.auth import ApiKeys, RateLimiter
from far_runtime.serve.exceptions import DeadlineExceeded, ModelNotFound
from far_runtime.serve.jobs import EditJob, Job, JobResult, Pixels
from far_runtime.serve.jobs import OnLevel as OnJobLevel
from far_runtime.serve.metrics import Metrics
from far_runtime.serve.middleware import INVALID_KEY
from far_runtime.serve.models import Model
from far_runtime.serve.schema import EditRequest, Image, ImageRequest, ImagesResponse, Timings
from far_runtime.serve.uploads import read_edit

OnLevel = Callable[[int, int, Pixels], None]
"""Called on the batcher's thread with the picture's index in its request, the step's number, and the picture."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    max_pictures: int = 8
    """Pictures of one request."""

    max_prompt: int = 500
    """Characters of a prompt."""

    max_body: int = 1 << 20
    """Bytes of a request without files."""

    max_upload: int = 16 << 20
    """Bytes of a request with files."""

    max_pixels: int = 16_000_000
    """Pixels of an uploaded picture."""

    deadline: float = 120.0
    """Seconds within which a request's pictures have to be drawn."""

    body_timeout: float = 20.0
    """Seconds within which a request's body has to arrive."""

    grace: float = 60.0
    """Seconds that running requests have to finish after SIGTERM."""


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that the model can draw."""

    request: ImageRequest
    """The request as it came."""

    model: Model
    """The model that it asks for."""

    subject: Subject
    """What its pictures show."""

    settings: dict[str, Any]
    """Resolved sampling settings."""

    plan: Plan
    """The steps of the loop under these settings."""

    seed: int
    """Seed of the first picture."""


@dataclass(frozen=True)
class QueuedRequest:
    """A request whose pictures are in the queue."""

    request: ImageRequest
    """The request as it came."""

    model: Model
    """The model that draws it."""

    settings: dict[str, Any]
    """Resolved sampling settings."""

    plan: Plan
    """The steps of the loop under these settings."""

    seed: int
    """Seed of the first picture."""

    jobs: list[Job]
    """One job for each picture."""

    def cancel(self) -> None:
        """Cancel all of its jobs."""
        for job in self.jobs:
            job.cancel()


@dataclass(frozen=True)
class Service:
    """Models, and who may ask them for how many pictures."""

    models: Sequence[Model]
    """Open models; the first one is the default."""

    metrics: Metrics
    """Where rejections are counted."""

    limits: Limits
    """What a client may ask for."""

    keys: ApiKeys | None = None
    """The API keys, None to serve everyone."""

    rate_limiter: RateLimiter | None = None
    """The rate of each client, None for no limit."""

    decoding: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while uploaded pictures are decoded, since a small file may hold many pixels."""

    def model(self, name: str | None) -> Model:
        """The model of a name, or the default for None; raises ModelNotFound."""
        for model in self.models:
            if name in (None, model.name):
                return model
        names = ", ".join(model.name for model in self.models)
        raise ModelNotFound(f"model {name!r}: not served here; use one of {names}")

    def authenticate(self, http_request: Request, key: str | None) -> object:
        """Whose rate a request counts to: its API key, or its address if the server has no keys.

        Raises HTTPException 401 for a missing or unknown key.
        """
        if self.keys is None:
            return http_request.client.host if http_request.client else ""
        position = None if key is None else self.keys.index(key)
        if position is None:
            self.metrics.rejections.labels("key").inc()
            raise HTTPException(401, INVALID_KEY)
        return position

    def submit(self, request: ImageRequest, client: object, on_level: OnLevel | None = None) -> QueuedRequest:
        """Validate a request and queue its pictures.

        Raises FarError for an invalid request, QueueFull, and HTTPException 429 where the client's rate is used up.
        """
        validated = self.validate(request)
        with self._rate_limited(client, request.n):
            return self._enqueue(validated, on_level)

    async def submit_edit(self, request: EditRequest, client: object, on_level: OnLevel | None = None) -> QueuedRequest:
        """Validate an edit and queue its pictures; raises what `submit` raises.

        The uploaded pictures are decoded last, when everything else was found right.
        """
        validated = self.validate(request, editing=True)
        model = validated.model
        model.check_editing()
        with self._rate_limited(client, request.n):
            model.batcher.check_capacity(request.n)
            image, mask = await request.image.read(), await request.mask.read() if request.mask else None
            size, max_pixels = model.manifest.model.image_size, self.limits.max_pixels
            async with self.decoding:
                edit = await asyncio.to_thread(read_edit, image, mask, request.outpaint, size, max_pixels)
            return self._enqueue(validated, on_level, EditJob(edit, request.feather))

    def validate(self, request: ImageRequest, editing: bool = False) -> ValidatedRequest:
        """Resolve a request's model, subject, settings and seed; raises FarError for an invalid request."""
        model, limits = self.model(request.model), self.limits
        if request.n > limits.max_pictures:
            raise FarError(f"n {request.n}: this server draws up to {limits.max_pictures} pictures per request")
        if max(len(request.prompt or ""), len(request.negative)) > limits.max_prompt:
            raise FarError(f"the prompt has more than {limits.max_prompt} characters; shorten it")
        if request.size not in (None, "auto", model.size):
            raise FarError(f"size {request.size!r}: {model.name} draws {model.size}; leave it out")
        subject = model.subject(request.prompt, request.label, request.negative, allow_null=editing)
        if editing and "guidance" in request.sampling() and is_null(model.manifest, subject):
            raise FarError("guidance leads towards a prompt or label; give one, or leave guidance out")
        settings, plan = model.resolve(request.sampling())
        seed = random_seed() if request.seed is None else request.seed
        if seed + request.n > 2**64:
            raise FarError(f"seed {seed}: with n {request.n} the last seed is beyond 18446744073709551615")
        return ValidatedRequest(request=request, model=model, subject=subject, settings=settings, plan=plan, seed=seed)

    def _enqueue(
        self, validated: ValidatedRequest, on_level: OnLevel | None, edit: EditJob | None = None
    ) -> QueuedRequest:
        """Queue the pictures of a request; raises QueueFull or ShuttingDown."""
        request, model, settings = validated.request, validated.model, validated.settings

        def on_level_of(index: int) -> OnJobLevel | None:
            return None if on_level is None else lambda step, pixels: on_level(index, step, pixels)

        settings_key = batch_key(settings, validated.plan)
        jobs = [
            Job(
                subject=validated.subject,
                seed=validated.seed + i,
                settings=settings,
                settings_key=settings_key,
                on_level=on_level_of(i),
                edit=edit,
            )
            for i in range(request.n)
        ]
        model.batcher.submit(jobs)
        return QueuedRequest(
            request=request, model=model, settings=settings, plan=validated.plan, seed=validated.seed, jobs=jobs
        )

    @contextmanager
    def _rate_limited(self, client: object, count: int) -> Iterator[None]:
        """Count pictures to a client's rate, unless the block raises: a rejected request costs nothing.

        Raises HTTPException 429 where the rate is used up, FarError where `count` is beyond it at any time.
        """
        limiter = self.rate_limiter
        if limiter is None:
            yield
            return
        if count > limiter.per_minute:
            raise FarError(f"n {count}: this server draws {limiter.per_minute} pictures a minute for each client")
        if wait := math.ceil(limiter.acquire(client, count)):
            self.metrics.rejections.labels("rate").inc()
            message = f"the rate of {limiter.per_minute} pictures a minute is used up; try again in {wait} s"
            raise HTTPException(429, message, {"Retry-After": str(wait)})
        try:
            yield
        except BaseException:
            limiter.refund(client, count)
            raise


async def wait_for_results(queued: QueuedRequest, timeout: float) -> list[JobResult]:
    """The results of a request's jobs; raises DeadlineExceeded after `timeout` seconds, GenerationFailed for a picture
    that could not be drawn."""
    futures = [asyncio.wrap_future(job.future) for job in queued.jobs]
    try:
        done, pending = await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
        if errors := [error for future in done if (error := future.exception())]:
            raise errors[0]
        if pending:
            raise DeadlineExceeded(f"not drawn within {timeout:g} s; ask for fewer pictures or steps, or try later")
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


async def cancel_on_disconnect(http_request: Request, work: Awaitable[list[JobResult]]) -> list[JobResult]:
    """The result of `work`; raises HTTPException 499, which nobody reads, if the client disconnects first."""

    async def disconnected() -> None:
        while (await http_request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client has disconnected")
        return await task
    finally:
        task.cancel()
        watch.cancel()


async def encode_base64(pixels: Pixels, output_format: str, settings: PictureMetadata | None = None) -> str:
    """A picture as a file in base64, encoded on another thread."""
    return base64.b64encode(await asyncio.to_thread(picture_bytes, pixels, output_format, settings)).decode()


async def encode_result(queued: QueuedRequest, index: int, result: JobResult) -> Image:
    """A finished picture of a request as it is sent."""
    file = await encode_base64(result.pixels, queued.request.output_format, result.settings)
    return Image(b64_json=file, seed=queued.seed + index, settings=result.settings.to_dict())


def timings_of(results: Sequence[JobResult]) -> Timings:
    """The seconds of a request, whose pictures may have been drawn in several batches."""
    batches = {(result.seconds, *result.stages.values()): result for result in results}.values()
    names = list(dict.fromkeys(name for batch in batches for name in batch.stages))
    return Timings(
        waited=max(result.waited for result in results),
        drawing=sum(batch.seconds for batch in batches),
        stages={name: sum(batch.stages.get(name, 0.0) for batch in batches) for name in names},
    )


async def images_response(queued: QueuedRequest, results: Sequence[JobResult]) -> ImagesResponse:
    """The response to a request whose pictures are finished."""
    return ImagesResponse(
        created=int(time.time()),
        model=queued.model.name,
        data=await asyncio.gather(*(encode_result(queued, i, result) for i, result in enumerate(results))),
        timings=timings_of(results),
        warnings=list(dict.fromkeys(warning for result in results for warning in result.warnings)),
    )
