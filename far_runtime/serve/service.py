"""What becomes of a request for pictures: it is checked, queued, waited for and answered."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException, Request

from far_runtime.conditioning.subjects import Subject, is_null
from far_runtime.errors import FarError, fields_for_options
from far_runtime.images.writing import picture_bytes
from far_runtime.sampling.noise import random_seed
from far_runtime.sampling.settings import batch_key
from far_runtime.serve.auth import Keys, Rate
from far_runtime.serve.batching import EditJob, Job, JobResult, Pixels
from far_runtime.serve.errors import Late, Unknown
from far_runtime.serve.metrics import Metrics
from far_runtime.serve.middleware import NO_KEY
from far_runtime.serve.models import Model
from far_runtime.serve.schema import EditRequest, Image, ImageRequest, ImagesAnswer, Timings
from far_runtime.serve.uploads import edit_of

OnLevel = Callable[[int, int, Pixels], None]
"""Called, on the drawing thread, with which of the pictures, the step's number and the picture after it."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for. pictures: of one request. prompt: characters. body: bytes; upload: of a request with
    files; pixels: of each of these. deadline: seconds until a picture has to be drawn. body_seconds: until a body has
    to be there. grace: seconds to finish in after SIGTERM."""

    pictures: int = 8
    prompt: int = 500
    body: int = 1 << 20
    upload: int = 16 << 20
    pixels: int = 16_000_000
    deadline: float = 120.0
    body_seconds: float = 20.0
    grace: float = 60.0


@dataclass(frozen=True)
class QueuedRequest:
    """A request that can be: its model, settings and tickets."""

    request: ImageRequest
    model: Model
    settings: dict[str, Any]
    seed: int
    tickets: list[Job]

    def leave(self) -> None:
        """Nobody waits for it any longer."""
        for ticket in self.tickets:
            ticket.leave()


@dataclass(frozen=True)
class ValidatedRequest:
    """A request that can be: its model, subject, resolved settings and first seed."""

    request: ImageRequest
    model: Model
    subject: Subject
    settings: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Service:
    """What a server has: open models, the first of which is the default, and whom it draws for, how much. decoding:
    held while sent pictures are decoded."""

    models: Sequence[Model]
    metrics: Metrics
    limits: Limits
    keys: Keys | None = None
    rate: Rate | None = None
    decoding: asyncio.Lock = field(default_factory=asyncio.Lock)

    def model(self, name: str | None) -> Model:
        """A model by its name, or the default; Unknown for another."""
        for model in self.models:
            if name in (None, model.name):
                return model
        raise Unknown(f"model {name!r}: not served here; take one of {', '.join(model.name for model in self.models)}")

    def caller(self, request: Request, key: str | None) -> object:
        """Whose rate a request counts to: the key's, without keys the address's; HTTPException 401 for a wrong one."""
        if self.keys is None:
            return request.client.host if request.client else ""
        number = None if key is None else self.keys.which(key)
        if number is None:
            self.metrics.rejections.labels("key").inc()
            raise HTTPException(401, NO_KEY)
        return number

    def order(self, wanted: ImageRequest, caller: object, on_level: OnLevel | None = None) -> QueuedRequest:
        """Check a request and queue its pictures. FarError where it cannot be, HTTPException 429 where it may not."""
        checked = self.check(wanted)
        with self.spent(caller, wanted.n):
            return self.queue(checked, on_level)

    async def order_edit(self, wanted: EditRequest, caller: object, on_level: OnLevel | None = None) -> QueuedRequest:
        """The same for an edit, whose pictures are decoded one request at a time, after everything else is found right:
        a small file may be many pixels."""
        checked = self.check(wanted, editing=True)
        model = checked.model
        model.check_editing()
        with self.spent(caller, wanted.n):
            model.batcher.check_room(wanted.n)
            image, mask = await wanted.image.read(), await wanted.mask.read() if wanted.mask else None
            size, most = model.manifest.model["image_size"], self.limits.pixels
            with fields_for_options():
                async with self.decoding:
                    edit = await asyncio.to_thread(edit_of, image, mask, wanted.outpaint, size, most)
            return self.queue(checked, on_level, EditJob(edit, wanted.feather))

    def check(self, wanted: ImageRequest, editing: bool = False) -> ValidatedRequest:
        """What a request comes to; FarError where it cannot be."""
        model, limits = self.model(wanted.model), self.limits
        if wanted.n > limits.pictures:
            raise FarError(f"n {wanted.n}: this server draws up to {limits.pictures} pictures at a request")
        if max(len(wanted.prompt or ""), len(wanted.negative)) > limits.prompt:
            raise FarError(f"a prompt of more than {limits.prompt} characters; shorten it")
        if wanted.size not in (None, "auto", model.size):
            raise FarError(f"size {wanted.size!r}: {model.name} draws {model.size}; leave it out")
        subject = model.subject(wanted.prompt, wanted.label, wanted.negative, anything=editing)
        if editing and wanted.guidance is not None and is_null(model.manifest, subject):
            raise FarError("guidance leads towards a prompt or label; give one, or leave it out")
        settings = model.settings(wanted.sampling())
        seed = random_seed() if wanted.seed is None else wanted.seed
        if seed + wanted.n > 2**64:
            raise FarError(f"seed {seed}: with n {wanted.n} the last seed is beyond 18446744073709551615")
        return ValidatedRequest(wanted, model, subject, settings, seed)

    def queue(
        self, checked: ValidatedRequest, on_level: OnLevel | None, edited: EditJob | None = None
    ) -> QueuedRequest:
        """Queue the pictures of a request that was checked; QueueFull or Closed where that cannot be."""
        wanted, model, settings, seed = checked.request, checked.model, checked.settings, checked.seed

        def shown(index: int) -> Callable[[int, Pixels], None] | None:
            if on_level is None:
                return None
            return lambda step, pixels: on_level(index, step, pixels)

        kind = batch_key(model.manifest, settings)
        tickets = [Job(checked.subject, seed + i, settings, kind, shown(i), edited) for i in range(wanted.n)]
        model.batcher.submit(tickets)
        return QueuedRequest(wanted, model, settings, seed, tickets)

    @contextmanager
    def spent(self, caller: object, count: int) -> Iterator[None]:
        """Count pictures to the caller's rate, unless the block raises: what is refused costs nothing. HTTPException
        429 where the rate has no room for them."""
        self._spend(caller, count)
        try:
            yield
        except BaseException:
            if self.rate:
                self.rate.give(caller, count)
            raise

    def _spend(self, caller: object, count: int) -> None:
        if self.rate is None:
            return
        if count > self.rate.per_minute:
            raise FarError(f"n {count}: this server draws {self.rate.per_minute} pictures a minute for a key")
        if wait := math.ceil(self.rate.take(caller, count)):
            self.metrics.rejections.labels("rate").inc()
            message = f"{self.rate.per_minute} pictures a minute is all that may; try again in {wait} s"
            raise HTTPException(429, message, {"Retry-After": str(wait)})


async def drawn_in_time(made: QueuedRequest, seconds: float) -> list[JobResult]:
    """All pictures of an order; Late where that takes too long, Failed where one could not be drawn."""
    futures = [asyncio.wrap_future(ticket.future) for ticket in made.tickets]
    try:
        done, waiting = await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        if errors := [error for future in done if (error := future.exception())]:
            raise errors[0]
        if waiting:
            raise Late(f"not drawn within {seconds:g} s; ask for fewer pictures or steps, or later")
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


async def until_gone(request: Request, work: Any) -> list[JobResult]:
    """The work's result; 499 (nobody reads it) where the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client has left")
        return list(await task)
    finally:
        task.cancel()
        leaving.cancel()


async def base64_file(pixels: Pixels, kind: str, drawn: JobResult | None = None) -> str:
    """A picture as a file in base64, made on another thread."""
    settings = None if drawn is None else drawn.settings
    return base64.b64encode(await asyncio.to_thread(picture_bytes, pixels, kind, settings)).decode()


def picture_of(made: QueuedRequest, index: int, drawn: JobResult, file: str) -> Image:
    """A picture as it is sent."""
    return Image(b64_json=file, seed=made.seed + index, settings=drawn.settings.to_dict())


def timings(drawn: Sequence[JobResult]) -> Timings:
    """Of an order's pictures, which may have been drawn in several batches."""
    batches = {(one.seconds, *one.stages.values()): one for one in drawn}.values()
    names = list(dict.fromkeys(name for one in batches for name in one.stages))
    stages = {name: sum(one.stages.get(name, 0.0) for one in batches) for name in names}
    return Timings(waited=max(one.waited for one in drawn), drawing=sum(one.seconds for one in batches), stages=stages)


def answer(made: QueuedRequest, drawn: Sequence[JobResult], files: Sequence[str]) -> ImagesAnswer:
    """What is sent for an order."""
    return ImagesAnswer(
        created=int(time.time()),
        model=made.model.name,
        data=[picture_of(made, i, one, file) for i, (one, file) in enumerate(zip(drawn, files, strict=True))],
        timings=timings(drawn),
        warnings=list(dict.fromkeys(warning for one in drawn for warning in one.warnings)),
    )
