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
from far_runtime.serve.errors import ERROR_RESPONSES, add_exception_handlers, error_responses
from far_runtime.serve.events import (
    EVENT_STREAM,
    STREAM_EVENTS,
    EventStreamResponse,
    LevelStream,
    check_single_picture,
    event_stream_schema,
    level_queue,
    openai_events,
    stream_levels,
    stream_partial_images,
)
from far_runtime.serve.metrics import MetricsMiddleware
from far_runtime.serve.middleware import ApiKeyMiddleware, BodyLimitMiddleware, HostMiddleware
from far_runtime.serve.models import Model
from far_runtime.serve.schema import (
    Completed,
    EditRequest,
    GenerationRequest,
    Health,
    ImageRequest,
    ImagesResponse,
    Level,
    ModelCard,
    ModelList,
    PartialImage,
)
from far_runtime.serve.service import QueuedRequest, Service, cancel_on_disconnect, images_response, wait_for_results

EDITS = "/v1/images/edits"
STREAM_DESCRIPTION = (
    "Server-sent events: `level` (a Level) for every picture and step of the loop, `picture` (an Image) for every "
    "finished picture, then `done` (Timings); or `error` (an ErrorBody)."
)
IMAGES_DESCRIPTION = (
    "The pictures; with `stream`, server-sent events: up to `partial_images` times `image_generation.partial_image` (a "
    "PartialImage; of an edit `image_edit.partial_image`), then `image_generation.completed` (a Completed); or `error`."
)
PAGE = Path(__file__).with_name("page")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

BEARER = HTTPBearer(auto_error=False, description="An API key from the file given to --keys.")
ROUTER = APIRouter()


def get_service(request: Request) -> Service:
    """The service of the application."""
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]


def get_client(
    request: Request, service: ServiceDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]
) -> object:
    """Whose rate the request counts to; 401 without a valid key if the server has keys."""
    return service.authenticate(request, credentials.credentials if credentials else None)


ClientDep = Annotated[object, Depends(get_client)]


def create_app(service: Service, hosts: frozenset[str] | None = None) -> FastAPI:
    """The application, which closes the models when it ends; hosts: host names that it answers to, None for any."""
    limits, metrics = service.limits, service.metrics

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(model.batcher.close, limits.grace) for model in service.models))

    # FastAPI's own documentation pages load assets from elsewhere, so they are off.
    app = FastAPI(
        title="far-deploy",
        version=__version__,
        description="Pictures from FAR, MAR and VAR bundles, by OpenAI's images API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(ROUTER)
    app.mount("/page", StaticFiles(directory=PAGE))
    add_exception_handlers(app, metrics)

    def on_reject(reason: str) -> None:
        metrics.rejections.labels(reason).inc()

    # The middleware that is added last sees a request first.
    app.add_middleware(
        BodyLimitMiddleware,
        max_bytes=limits.max_body,
        max_bytes_by_path={EDITS: limits.max_upload},
        timeout=limits.body_timeout,
        on_reject=on_reject,
    )
    if service.keys is not None:
        keys = service.keys
        app.add_middleware(ApiKeyMiddleware, is_valid=lambda key: keys.index(key) is not None, on_reject=on_reject)
    if hosts is not None:
        app.add_middleware(HostMiddleware, hosts=hosts)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    customize_openapi(app, has_keys=service.keys is not None)
    return app


def images_responses(prefix: str) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that sends pictures, or a stream of one; prefix: see `openai_events`."""
    content = {EVENT_STREAM: event_stream_schema(openai_events(prefix))}
    return {**ERROR_RESPONSES, 200: {"content": content, "description": IMAGES_DESCRIPTION}}


@ROUTER.get("/", response_class=FileResponse, include_in_schema=False)
async def page() -> FileResponse:
    """The page to draw with."""
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


@ROUTER.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    responses=images_responses("image_generation"),
    tags=["images"],
)
async def generations(
    body: GenerationRequest, request: Request, service: ServiceDep, client: ClientDep
) -> ImagesResponse | StreamingResponse:
    """Draw pictures and send all of them at once, or one as a stream."""
    if body.stream:
        check_single_picture(body)
        levels, on_level = level_queue()
        queued = service.submit(body, client, on_level if body.partial_images else None)
        events = stream_partial_images(LevelStream(queued, levels, service), "image_generation")
        return EventStreamResponse(events, queued)
    return await finish(service.submit(body, client), request, service.limits.deadline)


@ROUTER.post(EDITS, response_model=ImagesResponse, responses=images_responses("image_edit"), tags=["images"])
async def edits(
    body: Annotated[EditRequest, Form(media_type="multipart/form-data")],
    request: Request,
    service: ServiceDep,
    client: ClientDep,
) -> ImagesResponse | StreamingResponse:
    """Draw a part of a picture, and send all results at once, or one as a stream."""
    if body.stream:
        check_single_picture(body)
        levels, on_level = level_queue()
        queued = await service.submit_edit(body, client, on_level if body.partial_images else None)
        events = stream_partial_images(LevelStream(queued, levels, service), "image_edit")
        return EventStreamResponse(events, queued)
    return await finish(await service.submit_edit(body, client), request, service.limits.deadline)


async def finish(queued: QueuedRequest, request: Request, timeout: float) -> ImagesResponse:
    """Wait for a request's pictures, at most `timeout` seconds, and encode them."""
    try:
        results = await cancel_on_disconnect(request, wait_for_results(queued, timeout))
    finally:
        queued.cancel()
    return await images_response(queued, results)


@ROUTER.post(
    "/v1/generate/stream",
    response_class=StreamingResponse,
    responses={
        **ERROR_RESPONSES,
        200: {"content": {EVENT_STREAM: event_stream_schema(STREAM_EVENTS)}, "description": STREAM_DESCRIPTION},
    },
    tags=["images"],
)
async def stream(body: ImageRequest, service: ServiceDep, client: ClientDep) -> StreamingResponse:
    """Draw pictures and send every level as it is computed."""
    levels, on_level = level_queue()
    queued = service.submit(body, client, on_level)
    return EventStreamResponse(stream_levels(LevelStream(queued, levels, service)), queued)


@ROUTER.get("/v1/models", response_model=ModelList, responses=error_responses(401), tags=["models"])
async def list_models(service: ServiceDep, client: ClientDep) -> ModelList:
    """The models of this server, the default one first."""
    return ModelList(data=[model_card(model) for model in service.models])


@ROUTER.get("/v1/models/{name}", response_model=ModelCard, responses=error_responses(401, 404), tags=["models"])
async def retrieve_model(name: str, service: ServiceDep, client: ClientDep) -> ModelCard:
    """A model by its name."""
    return model_card(service.model(name))


@ROUTER.get("/healthz", response_model=Health, tags=["server"])
async def healthz() -> Health:
    """Whether the server answers."""
    return Health(status="ok")


@ROUTER.get("/readyz", response_model=Health, responses={503: {"model": Health}}, tags=["server"])
async def readyz(service: ServiceDep, response: Response) -> Health:
    """Whether every model draws."""
    dead = [model.name for model in service.models if not model.batcher.alive]
    response.status_code = 503 if dead else 200
    return Health(status=f"not drawing: {', '.join(dead)}" if dead else "ok")


@ROUTER.get("/metrics", response_class=Response, tags=["server"], responses={200: {"content": {"text/plain": {}}}})
async def show_metrics(service: ServiceDep) -> Response:
    """Metrics in Prometheus's format."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def model_card(model: Model) -> ModelCard:
    """A model as OpenAI's API lists it."""
    return ModelCard(id=model.name, created=model.created, far=model.info())


def customize_openapi(app: FastAPI, has_keys: bool) -> None:
    """Let the OpenAPI document say what the server does: invalid requests are answered with 400 in place of FastAPI's
    422, keys are asked for only if the server has some, and the data of events has schemas."""
    default_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = default_openapi()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    if not has_keys:
                        operation.pop("security", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            for model in (Level, PartialImage, Completed):
                schema["components"]["schemas"][model.__name__] = model.model_json_schema()
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
