"""Requests and answers of the API: OpenAI's images API, and what a FAR needs beside it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from typing_extensions import Self

from far_runtime.sampling.options import SETTINGS, Setting

MOST_PROMPT, MOST_PICTURES, MOST_SEED, MOST_SCALE = 1000, 64, 2**64 - 1, 100
"""Limits that the schema knows; a server's own may be lower."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=0, le=MOST_SCALE, allow_inf_nan=False)]
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
    """What every request for pictures says beside the sampling settings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(max_length=MOST_PROMPT)] | None = Field(
        None, description="What to draw. With a model of class labels: the name of a class, or its number."
    )
    label: int | Text | None = Field(None, description="In place of a prompt: a class, by number or name.")
    negative: Annotated[str, Field(max_length=MOST_PROMPT)] = Field(
        "", description="What guidance leads away from, with a model that reads text."
    )
    model: Text | None = Field(None, description="One of /v1/models; default: the first.")
    n: int = Field(1, ge=1, le=MOST_PICTURES, description="Pictures, with the seeds seed, seed + 1, ...")
    seed: int | None = Field(None, ge=0, le=MOST_SEED, description="Default: a random one, which the answer tells.")
    size: Text | None = Field(None, description="The model's own, as 256x256, or auto.")
    response_format: Literal["b64_json"] | None = Field(None, description="Pictures come in the answer itself.")
    output_format: Literal["png", "webp", "jpeg"] = Field("png", description="PNG and WebP are lossless.")
    user: Text | None = Field(None, description="Taken and not used.")


if TYPE_CHECKING:
    SettingsRequest = PictureRequest
else:
    setting_fields = {name: setting_field(setting) for name, setting in SETTINGS.items()}
    SettingsRequest = create_model("SettingsRequest", __base__=PictureRequest, **setting_fields)


class ImageRequest(SettingsRequest):
    """Pictures that are asked for. Sampling settings that are not given are those of the preset, or the bundle's."""

    def sampling(self) -> dict[str, Any]:
        """The sampling settings that were given, by name."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}


class GenerationRequest(ImageRequest):
    """A request of OpenAI's routes, which may be answered by a stream of OpenAI's events."""

    stream: bool = Field(False, description="Answer with server-sent events, of one picture.")
    partial_images: int = Field(0, ge=0, le=3, description="So many pictures on the way, in a stream.")

    @model_validator(mode="after")
    def _partial_images_are_streamed(self) -> Self:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images come in a stream; send stream true beside them")
        return self


class EditRequest(GenerationRequest):
    """An edit that is asked for, as a form with files. What is drawn anew: where the mask, or without one the picture
    itself, is transparent; where a mask without any transparency is white; or the margins of `outpaint`."""

    model_config = ConfigDict(extra="forbid", strict=False)

    image: UploadFile = Field(description="The picture: PNG, JPEG or WebP, of any size.")
    mask: UploadFile | None = Field(None, description="As large as the picture.")
    prompt: Annotated[str, Field(max_length=MOST_PROMPT)] | None = Field(
        None, description="What the new part shows. Nothing: the picture alone says what to draw."
    )
    outpaint: Text | None = Field(None, description="In place of a mask: pixels to add by side, as left=16,top=8.")
    feather: int = Field(1, ge=0, le=64, description="Pixels of transition, inside of what is drawn anew.")
    levels: Text | None = Field(None, description=SETTINGS["levels"].help)
    steps: Text | None = Field(None, description=SETTINGS["steps"].help)


class Image(BaseModel):
    """A picture. b64_json: the file in base64, with its settings in it where it is PNG. settings: what it was made
    with, enough to make it again."""

    b64_json: str
    seed: int
    settings: dict[str, Any]
    revised_prompt: None = None


class Timings(BaseModel):
    """Seconds: in the queue (the longest of the pictures), in the batches, and in the stages of these."""

    waited: float
    drawing: float
    stages: dict[str, float]


class ImagesResponse(BaseModel):
    """Pictures in the order of their seeds. created: seconds since 1970."""

    created: int
    model: str
    data: list[Image]
    timings: Timings
    warnings: list[str]


class Level(BaseModel):
    """A picture on its way, event `level`. index: which of the n. step: from 0, of `steps`. name: as "level 3"."""

    index: int
    step: int
    steps: int
    name: str
    b64_json: str


class ImageEvent(BaseModel):
    """What the events of OpenAI's streams have in common. created_at: seconds since 1970. size: as 64x64."""

    type: str
    b64_json: str
    created_at: int
    size: str
    output_format: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"


class PartialImage(ImageEvent):
    """A picture on its way, event `image_generation.partial_image` or `image_edit.partial_image`."""

    partial_image_index: int


class Completed(ImageEvent, Image):
    """The finished picture, event `image_generation.completed` or `image_edit.completed`."""


class ModelCard(BaseModel):
    """A model as OpenAI's API lists it. far: what it draws from, and how."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "far-deploy"
    far: dict[str, Any]


class ModelList(BaseModel):
    """All models of the server, the default one first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What was wrong, and what to do; param: the field that it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error as OpenAI's API has it."""

    error: ErrorDetail


class Health(BaseModel):
    """status: ok, or what is wrong."""

    status: str
