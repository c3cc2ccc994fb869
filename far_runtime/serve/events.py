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
from far_runtime.serve.errors import error_response, record_error
from far_runtime.serve.jobs import JobResult, Pixels
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
from far_runtime.serve.service import (
    OnLevel,
    QueuedRequest,
    Service,
    encode_base64,
    encode_result,
    timings_of,
    wait_for_results,
)

EVENT_STREAM = "text/event-stream"
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
MAX_WAITING_LEVELS = 64
"""Levels of a stream that wait to be sent; a client that reads more slowly misses the oldest ones."""

STREAM_EVENTS: dict[str, type[BaseModel]] = {"level": Level, "picture": Image, "done": Timings, "error": ErrorBody}
"""The events of /v1/generate/stream, and their data."""


@dataclass(frozen=True)
class LevelUpdate:
    """A picture after a step of the loop."""

    index: int
    """Which picture of the request."""

    step: int
    """The number of the step."""

    pixels: Pixels
    """[H, W, 3]."""


@dataclass(frozen=True)
class LevelStream:
    """A queued request whose levels are sent as they are computed."""

    queued: QueuedRequest
    """The request."""

    levels: asyncio.Queue[LevelUpdate]
    """Its levels that wait to be sent."""

    service: Service
    """The service that draws it."""


def openai_events(prefix: str) -> dict[str, type[BaseModel]]:
    """The events of a stream of OpenAI's API, and their data; prefix: image_generation or image_edit."""
    return {f"{prefix}.partial_image": PartialImage, f"{prefix}.completed": Completed, "error": ErrorBody}


def event_stream_schema(events: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """The content of a response with these events, as OpenAPI 3.2 describes it."""

    def event_schema(name: str, data: type[BaseModel]) -> dict[str, Any]:
        content = {"$ref": f"#/components/schemas/{data.__name__}"}
        text = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
        return {"type": "object", "required": ["event", "data"], "properties": {"event": {"const": name}, "data": text}}

    return {"itemSchema": {"oneOf": [event_schema(name, data) for name, data in events.items()]}}


def level_queue() -> tuple[asyncio.Queue[LevelUpdate], OnLevel]:
    """A queue of levels, and what the batcher's thread calls to put one there."""
    loop = asyncio.get_running_loop()
    levels: asyncio.Queue[LevelUpdate] = asyncio.Queue(MAX_WAITING_LEVELS)

    def put(update: LevelUpdate) -> None:
        if levels.full():
            levels.get_nowait()
        levels.put_nowait(update)

    def on_level(index: int, step: int, pixels: Pixels) -> None:
        loop.call_soon_threadsafe(put, LevelUpdate(index, step, pixels.copy()))

    return levels, on_level


def check_single_picture(request: GenerationRequest) -> None:
    """Raise FarError for several pictures, which OpenAI's events do not tell apart."""
    if request.n > 1:
        raise FarError(f"n {request.n}: a stream of this route has one picture; use n 1, or /v1/generate/stream")


async def stream_levels(stream: LevelStream) -> AsyncIterator[str]:
    """The events of /v1/generate/stream: `level` for every picture and step, `picture` for each finished picture,
    then `done`; or `error`."""
    queued = stream.queued
    names = [step.name for step in queued.plan]
    try:
        async with aclosing(_updates(stream)) as updates:
            async for update in updates:
                if isinstance(update, LevelUpdate):
                    file = await encode_base64(update.pixels, queued.request.output_format)
                    name = names[update.step]
                    level = Level(index=update.index, step=update.step, steps=len(names), name=name, b64_json=file)
                    yield format_event("level", level)
                    continue
                for i, result in enumerate(update):
                    yield format_event("picture", await encode_result(queued, i, result))
                yield format_event("done", timings_of(update))
    except Exception as error:
        yield error_event(error, stream.service.metrics)


async def stream_partial_images(stream: LevelStream, prefix: str) -> AsyncIterator[str]:
    """The events of OpenAI's API: `prefix`.partial_image for some of the steps, then `prefix`.completed; or `error`."""
    queued = stream.queued
    count = getattr(queued.request, "partial_images", 0)
    steps = sorted(partial_image_steps(len(queued.plan), count))
    output_format = queued.request.output_format

    def common(event: str) -> dict[str, Any]:
        return {
            "type": f"{prefix}.{event}", "created_at": int(time.time()), "size": queued.model.size,
            "output_format": output_format,
        }  # fmt: skip

    try:
        async with aclosing(_updates(stream)) as updates:
            async for update in updates:
                if isinstance(update, list):
                    image = await encode_result(queued, 0, update[0])
                    completed = Completed(**common("completed"), **image.model_dump())
                    yield format_event(completed.type, completed)
                elif update.step in steps:
                    file = await encode_base64(update.pixels, output_format)
                    partial_image = PartialImage(
                        **common("partial_image"), b64_json=file, partial_image_index=steps.index(update.step)
                    )
                    yield format_event(partial_image.type, partial_image)
    except Exception as error:
        yield error_event(error, stream.service.metrics)


def partial_image_steps(steps: int, count: int) -> Collection[int]:
    """At most `count` of a loop's steps, evenly spread, without the last one, which ends with the finished picture."""
    places = ((i + 1) * steps // (count + 1) - 1 for i in range(count))
    return {step for step in places if 0 <= step < steps - 1}


def format_event(name: str, data: BaseModel) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {data.model_dump_json()}\n\n"


def error_event(error: Exception, metrics: Metrics) -> str:
    """The event of an exception, which is also recorded."""
    record_error(error, metrics)
    _, body, _ = error_response(error)
    return format_event("error", ErrorBody.model_validate(body))


async def _updates(stream: LevelStream) -> AsyncGenerator[LevelUpdate | list[JobResult], None]:
    """The levels as they are computed, at last all results; the request is cancelled when the client disconnects."""
    levels = stream.levels
    work = asyncio.ensure_future(wait_for_results(stream.queued, stream.service.limits.deadline))
    reading: asyncio.Future[LevelUpdate] | None = None
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
        stream.queued.cancel()


class EventStreamResponse(StreamingResponse):
    """A stream of events, which cancels its request when it ends: a client may be gone before the first event."""

    def __init__(self, events: AsyncIterator[str], queued: QueuedRequest) -> None:
        super().__init__(events, media_type=EVENT_STREAM, headers=UNBUFFERED)
        self._queued = queued

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._queued.cancel()
