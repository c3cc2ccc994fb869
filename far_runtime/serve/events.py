"""Streams of server-sent events: pictures on their way, in this API's own form and in OpenAI's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from far_runtime.errors import FarError
from far_runtime.serve.batching import JobResult, Pixels
from far_runtime.serve.errors import error_of, note
from far_runtime.serve.metrics import Metrics
from far_runtime.serve.schema import (
    Completed,
    ErrorBody,
    GenerationRequest,
    Image,
    Level,
    PartialImage,
    Timings,
)
from far_runtime.serve.service import OnLevel, QueuedRequest, Service, base64_file, drawn_in_time, picture_of, timings

EVENTS = "text/event-stream"
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
MOST_LEVELS = 64
"""Levels of a stream that wait to be sent; a client that reads too slowly for them misses the oldest."""

OWN: dict[str, type[BaseModel]] = {"level": Level, "picture": Image, "done": Timings, "error": ErrorBody}
"""The events of /v1/generate/stream, with their data."""

LevelPictures = tuple[int, int, Pixels]
"""Which of the pictures, the number of the step, the picture after it."""


@dataclass(frozen=True)
class Watched:
    """An order whose levels are sent as they come, by a service."""

    made: QueuedRequest
    levels: asyncio.Queue[LevelPictures]
    service: Service


def openais(what: str) -> dict[str, type[BaseModel]]:
    """The events of a stream by OpenAI's API, with their data; what: image_generation or image_edit."""
    return {f"{what}.partial_image": PartialImage, f"{what}.completed": Completed, "error": ErrorBody}


def described(events: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """What an OpenAPI document says of an answer of such events, in the words of OpenAPI 3.2."""

    def one(name: str, data: type[BaseModel]) -> dict[str, Any]:
        content = {"$ref": f"#/components/schemas/{data.__name__}"}
        text = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
        return {"type": "object", "required": ["event", "data"], "properties": {"event": {"const": name}, "data": text}}

    return {"itemSchema": {"oneOf": [one(name, data) for name, data in events.items()]}}


def levels_queue() -> tuple[asyncio.Queue[LevelPictures], OnLevel]:
    """A queue of levels, and what the drawing thread calls to put one there."""
    loop = asyncio.get_running_loop()
    levels: asyncio.Queue[LevelPictures] = asyncio.Queue(MOST_LEVELS)

    def put(level: LevelPictures) -> None:
        if levels.full():
            levels.get_nowait()
        levels.put_nowait(level)

    def on_level(index: int, step: int, pixels: Pixels) -> None:
        loop.call_soon_threadsafe(put, (index, step, pixels.copy()))

    return levels, on_level


def check_alone(wanted: GenerationRequest) -> None:
    """FarError for several pictures, which OpenAI's events do not tell apart."""
    if wanted.n > 1:
        raise FarError(f"n {wanted.n}: a stream of this route has one picture; use n 1, or /v1/generate/stream")


async def events(stream: Watched) -> AsyncIterator[str]:
    """`level` for every picture and step, `picture` for each finished one, `done`; or `error`."""
    made = stream.made
    names, kind = made.model.steps(made.settings), made.request.output_format
    try:
        async with aclosing(_progress(stream)) as progress:
            async for shown in progress:
                if isinstance(shown, tuple):
                    index, step, pixels = shown
                    file = await base64_file(pixels, kind)
                    level = Level(index=index, step=step, steps=len(names), name=names[step], b64_json=file)
                    yield event("level", level.model_dump_json())
                    continue
                for i, one in enumerate(shown):
                    picture = picture_of(made, i, one, await base64_file(one.pixels, kind, one))
                    yield event("picture", picture.model_dump_json())
                yield event("done", timings(shown).model_dump_json())
    except Exception as error:
        yield failed(error, stream.service.metrics)


async def openai_events(stream: Watched, what: str) -> AsyncIterator[str]:
    """The events of OpenAI's API: `what`.partial_image for some of the steps, `what`.completed; or `error`."""
    made = stream.made
    kind, size = made.request.output_format, made.model.size
    steps = sorted(chosen_steps(len(made.model.steps(made.settings)), getattr(made.request, "partial_images", 0)))

    def sent(shown: LevelPictures | list[JobResult], file: str) -> PartialImage | Completed:
        now = int(time.time())
        if isinstance(shown, list):
            picture = picture_of(made, 0, shown[0], file).model_dump()
            return Completed(type=f"{what}.completed", created_at=now, size=size, output_format=kind, **picture)
        return PartialImage(
            type=f"{what}.partial_image", partial_image_index=steps.index(shown[1]), b64_json=file, created_at=now,
            size=size, output_format=kind,
        )  # fmt: skip

    try:
        async with aclosing(_progress(stream)) as progress:
            async for shown in progress:
                if isinstance(shown, list):
                    file = await base64_file(shown[0].pixels, kind, shown[0])
                elif shown[1] in steps:
                    file = await base64_file(shown[2], kind)
                else:
                    continue
                body = sent(shown, file)
                yield event(body.type, body.model_dump_json())
    except Exception as error:
        yield failed(error, stream.service.metrics)


def chosen_steps(steps: int, count: int) -> Collection[int]:
    """At most `count` of a loop's steps, evenly spread and without the last, which ends with the finished picture."""
    places = ((i + 1) * steps // (count + 1) - 1 for i in range(count))
    return {step for step in places if 0 <= step < steps - 1}


def event(name: str, data: str) -> str:
    """A server-sent event; data is one line."""
    return f"event: {name}\ndata: {data}\n\n"


def failed(error: Exception, metrics: Metrics) -> str:
    """The event of an error, which is noted."""
    note(error, metrics)
    _, body, _ = error_of(error)
    return event("error", ErrorBody.model_validate(body).model_dump_json())


async def _progress(stream: Watched) -> AsyncGenerator[LevelPictures | list[JobResult], None]:
    """The levels as they come and at last all pictures; the order is left when the client goes."""
    levels = stream.levels
    work = asyncio.ensure_future(drawn_in_time(stream.made, stream.service.limits.deadline))
    reading: asyncio.Future[LevelPictures] | None = None
    try:
        while not (work.done() and levels.empty()):
            reading = asyncio.ensure_future(levels.get())
            await asyncio.wait({work, reading}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                yield reading.result()
            else:
                reading.cancel()
        yield await work
    finally:
        work.cancel()
        if reading is not None:
            reading.cancel()
        stream.made.leave()


class EventStream(StreamingResponse):
    """Events as an answer. made: the order behind them, which is left when the answer ends, however it does: a client
    may be gone before the first event."""

    def __init__(self, found: AsyncIterator[str], made: QueuedRequest) -> None:
        super().__init__(found, media_type=EVENTS, headers=UNBUFFERED)
        self._made = made

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._made.leave()
