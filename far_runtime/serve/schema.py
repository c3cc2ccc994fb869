"""Requests and responses of the API: OpenAI's images API, and the settings of FAR, MAR and VAR beside it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from typing_extensions import Self

from far_runtime.sampling.options import SETTINGS, Setting

MAX_PROMPT, MAX_PICTURES, MAX_SEED, MAX_SCALE = 1000, 64, 2**64 - 1, 100
"""Limits of the schema; those of a server may be lower."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=200)]
Numbers = Annotated[list[int], Field(max_length=1024)]


LISTS: dict[str, Any] = {"levels": Numbers | Text, "steps": int | Numbers | Text}
"""The types of settings that may be lists of numbers."""


def setting_field(setting: Setting) -> tuple[Any, Any]:
    """Type and description of a sampling setting's field. What depends on a model, such as the range of `top_k`, is
    checked when the request's model is known."""
    number = Scale if setting.highest == math.inf else Finite
    value = LISTS.get(setting.name) or {str: Text, float: number}.get(setting.type, setting.type)
    return value | None, Field(None, description=setting.help)


class PictureRequest(BaseModel):
    """The fields of every request for pictures beside the sampling settings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = Field(
        None, description="What to draw. For a model of class labels, the name or number of a class."
    )
    label: int | Text | None = Field(None, description="A class, by number or name, in place of a prompt.")
    negative: Annotated[str, Field(max_length=MAX_PROMPT)] = Field(
        "", description="What guidance leads away from; for models that read text."
    )
    model: Text | None = Field(None, description="One of /v1/models. Default: the first.")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="How many pictures; their seeds are seed, seed + 1, ...")
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the first picture. Default: a random one, which the response tells.",
    )
    size: Text | None = Field(None, description="The size of the model's pictures, such as 256x256, or auto.")
    response_format: Literal["b64_json"] | None = Field(None, description="Pictures come in the response itself.")
    output_format: Literal["png", "webp", "jpeg"] = Field(
        "png", description="Format of the files; png and webp are lossless."
    )
    user: Text | None = Field(None, description="Accepted and ignored.")


if TYPE_CHECKING:
    SettingsRequest = PictureRequest
else:
    setting_fields = {name: setting_field(setting) for name, setting in SETTINGS.items()}
    SettingsRequest = create_model("SettingsRequest", __base__=PictureRequest, **setting_fields)


class ImageRequest(SettingsRequest):
    """A request for pictures; settings that it leaves out come from its preset, or else from the bundle."""

    def sampling(self) -> dict[str, Any]:
        """The sampling settings of the request, by name; those that it leaves out are missing."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}


class GenerationRequest(ImageRequest):
    """A request to OpenAI's routes, which may be answered with a stream of events."""

    stream: bool = Field(False, description="Answer with server-sent events; for one picture only.")
    partial_images: int = Field(0, ge=0, le=3, description="How many pictures on their way a stream has.")

    @model_validator(mode="after")
    def _check_partial_images(self) -> Self:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images come in a stream; send stream true beside them")
        return self


class EditRequest(GenerationRequest):
    """A request for an edit, as a form with files.

    The part to draw is the transparent part of the mask, or of the image where there is no mask; the white part of a
    mask without transparency; or the margins of `outpaint`.
    """

    model_config = ConfigDict(extra="forbid", strict=False)

    image: UploadFile = Field(description="The picture to edit: PNG, JPEG or WebP, of any size.")
    mask: UploadFile | None = Field(None, description="Which part to draw; a picture as large as the image.")
    prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = Field(
        None, description="What the new part shows. Default: the picture alone decides."
    )
    outpaint: Text | None = Field(
        None, description="Pixels to add on each side, in place of a mask, such as left=16,top=8."
    )
    feather: int = Field(1, ge=0, le=64, description="Width of the transition inside the new part, in pixels.")
    levels: Text | None = Field(None, description=SETTINGS["levels"].help)
    steps: Text | None = Field(None, description=SETTINGS["steps"].help)


class ResponseModel(BaseModel):
    """A part of a response; the docstrings of its fields become their descriptions in the OpenAPI document."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Image(ResponseModel):
    """A finished picture."""

    b64_json: str
    """The file in base64; a PNG has the settings in it."""

    seed: int
    """The seed of its noise."""

    settings: dict[str, Any]
    """What it was made with, enough to make it again."""

    revised_prompt: None = None
    """A field of OpenAI's API; prompts are never revised."""


class Timings(ResponseModel):
    """How long a request took, in seconds."""

    waited: float
    """In the queue, for the picture that waited longest."""

    drawing: float
    """In the batches that its pictures were drawn in."""

    stages: dict[str, float]
    """In the stages of these batches, by their names."""


class ImagesResponse(ResponseModel):
    """The finished pictures of a request."""

    created: int
    """When the response was made, in seconds since 1970."""

    model: str
    """The name of the model."""

    data: list[Image]
    """The pictures, in the order of their seeds."""

    timings: Timings
    """How long the request took."""

    warnings: list[str]
    """Warnings for the user."""


class Level(ResponseModel):
    """A picture after a step of the loop, the data of the event `level`."""

    index: int
    """Which picture of the request, from 0."""

    step: int
    """Which step, from 0."""

    steps: int
    """How many steps the loop has."""

    name: str
    """The name of the step, such as "level 3"."""

    b64_json: str
    """The file in base64."""


class ImageEvent(ResponseModel):
    """What the events of OpenAI's streams have in common."""

    type: str
    """The name of the event."""

    b64_json: str
    """The file in base64."""

    created_at: int
    """When the event was made, in seconds since 1970."""

    size: str
    """The size of the picture, such as 64x64."""

    output_format: str
    """png, webp or jpeg."""

    quality: Literal["auto"] = "auto"
    """A field of OpenAI's API; always the same."""

    background: Literal["opaque"] = "opaque"
    """A field of OpenAI's API; always the same."""


class PartialImage(ImageEvent):
    """A picture on its way, the data of `image_generation.partial_image` and `image_edit.partial_image`."""

    partial_image_index: int
    """Which of the partial images, from 0."""


class Completed(ImageEvent, Image):
    """The finished picture, the data of `image_generation.completed` and `image_edit.completed`."""


class ModelCard(ResponseModel):
    """A model, as OpenAI's API lists it."""

    id: str
    """Its name, which requests ask for."""

    object: Literal["model"] = "model"

    created: int
    """When it was opened, in seconds since 1970."""

    owned_by: str = "far-deploy"

    far: dict[str, Any]
    """What it can draw, its settings and presets, and its engine."""


class ModelList(ResponseModel):
    """The models of the server."""

    object: Literal["list"] = "list"

    data: list[ModelCard]
    """The default model comes first."""


class ErrorDetail(ResponseModel):
    """What was wrong with a request."""

    message: str
    """What was wrong, what was expected, and what mends it."""

    type: str
    """The class of the error, as OpenAI's API names it."""

    param: str | None
    """The field of the request that is wrong."""

    code: str | None
    """The kind of the error, for programs."""


class ErrorBody(ResponseModel):
    """An error, as OpenAI's API has it."""

    error: ErrorDetail


class Health(ResponseModel):
    """Whether the server is well."""

    status: str
    """ok, or what is wrong."""
