"""The application: OpenAI's images API, streams of levels, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from far_runtime import __version__
from far_runtime.serve.errors import SAID, handle_errors, only
from far_runtime.serve.events import (
    EVENTS,
    OWN,
    EventStream,
    Watched,
    check_alone,
    described,
    events,
    levels_queue,
    openai_events,
    openais,
)
from far_runtime.serve.metrics import Measured
from far_runtime.serve.middleware import BodyGuard, HostGuard, KeyGuard
from far_runtime.serve.models import Model
from far_runtime.serve.schema import (
    Completed,
    EditRequest,
    GenerationRequest,
    Health,
    ImageRequest,
    ImagesAnswer,
    Level,
    ModelCard,
    ModelList,
    PartialImage,
)
from far_runtime.serve.service import QueuedRequest, Service, answer, base64_file, drawn_in_time, until_gone

EDITS = "/v1/images/edits"
STREAM = (
    "Server-sent events: `level` (a Level) for every picture and step of the loop, `picture` (an Image) for every "
    "finished one, then `done` (Timings), or `error` (an ErrorBody)."
)
STREAMED = (
    "The pictures; with `stream`, server-sent events: up to `partial_images` times `image_generation.partial_image` (a "
    "PartialImage; of an edit `image_edit.partial_image`), then `image_generation.completed` (a Completed), or `error`."
)
PAGE = Path(__file__).with_name("page")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

BEARER = HTTPBearer(auto_error=False, description="A key of the file that --keys names.")
ROUTES = APIRouter()


def service_of(request: Request) -> Service:
    """The server's."""
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(service_of)]


def caller_of(
    request: Request, service: Served, given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]
) -> object:
    """Who asks; 401 without a right key where the server has keys."""
    return service.caller(request, given.credentials if given else None)


Caller = Annotated[object, Depends(caller_of)]


def create_app(service: Service, hosts: frozenset[str] | None = None) -> FastAPI:
    """The application, which closes the models when it ends. hosts: names by which it may be called (None: any)."""
    limits, metrics = service.limits, service.metrics

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(model.batcher.close, limits.grace) for model in service.models))

    about = "Pictures from FAR, MAR and VAR bundles, by OpenAI's images API."
    app = FastAPI(
        title="far-deploy", version=__version__, description=about, lifespan=lifespan, docs_url=None, redoc_url=None
    )  # their pages load assets from elsewhere
    app.state.service = service
    app.include_router(ROUTES)
    app.mount("/page", StaticFiles(directory=PAGE))
    handle_errors(app, metrics)

    def refused(reason: str) -> None:
        metrics.rejections.labels(reason).inc()

    of = {EDITS: limits.upload}
    app.add_middleware(BodyGuard, most=limits.body, of=of, seconds=limits.body_seconds, refused=refused)
    if service.keys is not None:
        keys = service.keys
        app.add_middleware(KeyGuard, known=lambda key: keys.which(key) is not None, refused=refused)
    if hosts is not None:
        app.add_middleware(HostGuard, hosts=hosts)
    app.add_middleware(Measured, metrics=metrics)
    describe(app, keys=service.keys is not None)
    return app


def pictures(what: str) -> dict[int | str, dict[str, Any]]:
    """What a route answers that sends pictures, or a stream of one."""
    return {**SAID, 200: {"content": {EVENTS: described(openais(what))}, "description": STREAMED}}


@ROUTES.get("/", response_class=FileResponse, include_in_schema=False)
async def page() -> FileResponse:
    """The page."""
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


@ROUTES.post(
    "/v1/images/generations", response_model=ImagesAnswer, responses=pictures("image_generation"), tags=["images"]
)
async def generations(
    wanted: GenerationRequest, request: Request, service: Served, caller: Caller
) -> ImagesAnswer | StreamingResponse:
    """Draw pictures and send them all together, or one as a stream."""
    if wanted.stream:
        check_alone(wanted)
        levels, on_level = levels_queue()
        made = service.order(wanted, caller, on_level if wanted.partial_images else None)
        return EventStream(openai_events(Watched(made, levels, service), "image_generation"), made)
    return await sent(service.order(wanted, caller), request, service.limits.deadline)


async def sent(made: QueuedRequest, request: Request, seconds: float) -> ImagesAnswer:
    """The answer to an order, within so many seconds."""
    try:
        drawn = await until_gone(request, drawn_in_time(made, seconds))
    finally:
        made.leave()
    files = await asyncio.gather(*(base64_file(one.pixels, made.request.output_format, one) for one in drawn))
    return answer(made, drawn, files)


@ROUTES.post(EDITS, response_model=ImagesAnswer, responses=pictures("image_edit"), tags=["images"])
async def edits(
    wanted: Annotated[EditRequest, Form(media_type="multipart/form-data")], request: Request, service: Served,
    caller: Caller,
) -> ImagesAnswer | StreamingResponse:  # fmt: skip
    """Draw a part of a picture anew, and send the pictures all together, or one as a stream."""
    if wanted.stream:
        check_alone(wanted)
        levels, on_level = levels_queue()
        made = await service.order_edit(wanted, caller, on_level if wanted.partial_images else None)
        return EventStream(openai_events(Watched(made, levels, service), "image_edit"), made)
    return await sent(await service.order_edit(wanted, caller), request, service.limits.deadline)


@ROUTES.post(
    "/v1/generate/stream",
    response_class=StreamingResponse,
    responses={**SAID, 200: {"content": {EVENTS: described(OWN)}, "description": STREAM}},
    tags=["images"],
)
async def stream(wanted: ImageRequest, service: Served, caller: Caller) -> StreamingResponse:
    """Draw pictures and send every level as it is computed."""
    levels, on_level = levels_queue()
    made = service.order(wanted, caller, on_level)
    return EventStream(events(Watched(made, levels, service)), made)


@ROUTES.get("/v1/models", response_model=ModelList, responses=only(401), tags=["models"])
async def list_models(service: Served, caller: Caller) -> ModelList:
    """What is served, the default first."""
    return ModelList(data=[card(model) for model in service.models])


@ROUTES.get("/v1/models/{name}", response_model=ModelCard, responses=only(401, 404), tags=["models"])
async def one_model(name: str, service: Served, caller: Caller) -> ModelCard:
    """One of them."""
    return card(service.model(name))


@ROUTES.get("/healthz", response_model=Health, tags=["server"])
async def healthz() -> Health:
    """Whether the server answers."""
    return Health(status="ok")


@ROUTES.get("/readyz", response_model=Health, responses={503: {"model": Health}}, tags=["server"])
async def readyz(service: Served, response: Response) -> Health:
    """Whether every model draws."""
    dead = [model.name for model in service.models if not model.batcher.alive]
    response.status_code = 503 if dead else 200
    return Health(status=f"not drawing: {', '.join(dead)}" if dead else "ok")


@ROUTES.get("/metrics", response_class=Response, tags=["server"], responses={200: {"content": {"text/plain": {}}}})
async def show_metrics(service: Served) -> Response:
    """Counters for Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def card(model: Model) -> ModelCard:
    """A model as it is listed."""
    return ModelCard(id=model.name, created=model.created, far=model.about())


def describe(app: FastAPI, keys: bool) -> None:
    """An OpenAPI document that says what is so: wrong requests are answered with 400, not 422, and keys are asked for
    where the server has some."""
    made = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    if not keys:
                        operation.pop("security", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            for model in (Level, PartialImage, Completed):  # data of events
                schema["components"]["schemas"][model.__name__] = model.model_json_schema()
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
