"""Picture files: PNG files with their metadata, contact sheets, grids of levels and animations."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngInfo

from far_runtime.conditioning.subjects import Subject
from far_runtime.errors import FarError, SettingName
from far_runtime.images.metadata import PictureMetadata
from far_runtime.storage.atomic import whole_file

KEY = "far-deploy"
"""Keyword of the PNG text chunk with the metadata."""

WEBP_LIMIT = 16383
"""The most pixels along a side of a WebP picture."""
FRAME_MS, LAST_FRAME_MS = 400, 2000
"""How long an animation shows a frame, and its last frame, in milliseconds."""

Pixels = NDArray[np.uint8]

_SHOWN_SIDE = 128
"""Smallest side of a picture in a grid, in pixels; smaller pictures are magnified."""
_NAME_LENGTH = 80
"""The most characters of a class name or prompt in the name of a file."""
_FONT_SIZE, _GAP, _CAPTION_WIDTH = 14, 6, 200
_PAPER, _INK = (255, 255, 255), (60, 60, 60)


def save_picture(path: Path, pixels: Pixels, metadata: PictureMetadata) -> None:
    """Write pixels [H, W, 3] and their metadata to a PNG file; FarError where it cannot be written."""
    _save_png(path, Image.fromarray(pixels), metadata.to_dict())


def save_sheet(path: Path, sheet: Image.Image, metadata: Sequence[PictureMetadata]) -> None:
    """Write a contact sheet to a PNG file, with the metadata of all its pictures."""
    _save_png(path, sheet, {"pictures": [picture.to_dict() for picture in metadata]})


def _save_png(path: Path, image: Image.Image, record: dict[str, Any]) -> None:
    with whole_file(path) as aside:
        image.save(aside, "PNG", pnginfo=_text(record))


def _text(record: dict[str, Any]) -> PngInfo:
    text = PngInfo()
    text.add_text(KEY, json.dumps(record))  # ASCII, as tEXt demands
    return text


def picture_bytes(pixels: Pixels, file_format: str = "png", metadata: PictureMetadata | None = None) -> bytes:
    """The bytes of a file with pixels [H, W, 3]: png (with the metadata), webp (lossless) or jpeg."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if file_format == "png":
        image.save(file, "PNG", pnginfo=None if metadata is None else _text(metadata.to_dict()))
    elif file_format == "webp":
        image.save(file, "WEBP", lossless=True)
    else:
        image.save(file, "JPEG", quality=95)
    return file.getvalue()


def read_metadata(path: Path) -> PictureMetadata:
    """The metadata that `save_picture` put into a PNG file; FarError for any other file."""
    try:
        with Image.open(path) as image:
            record = json.loads(image.info[KEY])
    except FileNotFoundError:
        raise FarError(
            f"{path}: no such file; ", SettingName("like"), " takes a PNG that far generate --each wrote"
        ) from None
    except KeyError:
        raise FarError(
            f"{path}: no settings of far-deploy in it (an editor may have dropped them); ",
            SettingName("like"),
            " takes a PNG as far generate --each wrote it",
        ) from None
    except (
        OSError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise FarError(
            f"{path}: no PNG with settings, or cut short ({error}); ",
            SettingName("like"),
            " takes a PNG that far generate --each wrote",
        ) from error
    if isinstance(record, dict) and "pictures" in record:
        count = f" of {len(record['pictures'])} pictures" if isinstance(record["pictures"], list) else ""
        raise FarError(
            f"{path}: is a contact sheet{count}; ",
            SettingName("like"),
            " takes one picture, as ",
            SettingName("each"),
            " writes them",
        )
    try:
        return PictureMetadata.from_dict(record)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise FarError(
            f"{path}: its settings are incomplete or damaged ({type(error).__name__}: {error}); ",
            SettingName("like"),
            " takes a PNG as far generate --each wrote it",
        ) from error


def file_name(metadata: PictureMetadata) -> str:
    """The file name of a single picture, such as 207-golden-retriever-seed-0.png."""
    return name_of(metadata.subject, metadata.seed)


def name_of(subject: Subject, seed: int) -> str:
    """The file name of a subject's picture with a seed. That of a prompt begins with a checksum, since prompts may have
    the same words."""
    words = "-".join(re.findall(r"[a-z0-9]+", subject.name.casefold()))[:_NAME_LENGTH].strip("-")
    first = f"{zlib.crc32(subject.name.encode()):08x}" if subject.label is None else str(subject.label)
    return "-".join(part for part in (first, words, "seed", str(seed)) if part) + ".png"


def grid_size(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """The largest width and height that a grid of pictures may have, in pixels."""
    scale = _scale(height, width)
    return _CAPTION_WIDTH + columns * (width * scale + _GAP), _caption_height() + rows * (height * scale + _GAP)


def picture_grid(pixels: Pixels, row_captions: Sequence[str], column_captions: Sequence[str]) -> Image.Image:
    """Pictures [rows, columns, H, W, 3] on white paper, with captions at the left ("\\n" begins a new line) and on top.

    Pictures smaller than 128 pixels are magnified by a whole number. A caption that is too wide ends in an ellipsis.
    """
    rows, columns, height, width, _ = pixels.shape
    scale = _scale(height, width)
    height, width = height * scale, width * scale
    font = _font()
    lines = [
        [_fit(line, font, _CAPTION_WIDTH - 2 * _GAP) for line in text.split("\n") if line] for text in row_captions
    ]
    left = max((round(font.getlength(line)) + 2 * _GAP for row in lines for line in row), default=_GAP)
    top = _caption_height() if any(column_captions) else _GAP
    sheet = Image.new("RGB", (left + columns * (width + _GAP), top + rows * (height + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, text in enumerate(column_captions):
        middle = left + c * (width + _GAP) + width / 2
        shown = _fit(text, font, width)
        draw.text((middle - font.getlength(shown) / 2, _GAP), shown, _INK, font)
    for r in range(rows):
        y = top + r * (height + _GAP)
        for i, line in enumerate(lines[r]):
            offset = height / 2 + (i - len(lines[r]) / 2) * _line_height()
            draw.text((left - _GAP - font.getlength(line), y + offset), line, _INK, font)
        for c in range(columns):
            shown_pixels = pixels[r, c].repeat(scale, axis=0).repeat(scale, axis=1)
            sheet.paste(Image.fromarray(shown_pixels), (left + c * (width + _GAP), y))
    return sheet


def check_animation(rows: int, columns: int, height: int, width: int) -> None:
    """FarError if an animation of such a grid cannot be written."""
    if not features.check("webp"):
        raise FarError(
            "this Pillow cannot write WebP; update it with: pip install -U Pillow, or drop ", SettingName("save_levels")
        )
    if max(grid_size(rows, columns, height, width)) > WEBP_LIMIT:
        raise FarError(
            SettingName("save_levels"),
            f": {rows} x {columns} pictures are larger than WebP's {WEBP_LIMIT} pixels; make fewer at a time with ",
            SettingName("count"),
        )


def save_animation(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write frames to a lossless WebP file that loops and rests on its last frame; FarError if it cannot be written."""
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    with whole_file(path) as aside:
        frames[0].save(
            aside, "WEBP", save_all=True, append_images=list(frames[1:]), duration=durations, loop=0, lossless=True
        )


def save_plain(path: Path, image: Image.Image) -> None:
    """Write a PNG file without metadata."""
    with whole_file(path) as aside:
        image.save(aside, "PNG")


def _scale(height: int, width: int) -> int:
    return max(1, -(-_SHOWN_SIDE // min(height, width)))


def _font() -> Any:
    try:
        return ImageFont.load_default(_FONT_SIZE)
    except (TypeError, ImportError):  # Pillow 10.0, or built without FreeType: its small bitmap font
        return ImageFont.load_default()


def _line_height() -> int:
    return round(_FONT_SIZE * 1.25)


def _caption_height() -> int:
    return _line_height() + 2 * _GAP


def _fit(text: str, font: Any, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
