"""Uploaded pictures: they become a picture of the model's size and the part of it to draw.

An uploaded file is decoded to pixels, and what is sent back is encoded from pixels: nothing else of the file is kept.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image

from far_runtime.errors import FarError
from far_runtime.images.edit import Edit, in_paint, out_paint, parse_margins
from far_runtime.images.reading import ImageFile, as_mask, as_picture, open_picture, transparent

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats of uploaded pictures: few decoders, all of them widely used."""


def read_edit(image: bytes, mask: bytes | None, outpaint: str | None, size: int, max_pixels: int) -> Edit:
    """The edit that an upload asks for.

    The part to draw is the transparent part of the mask, or of the image where there is no mask, as in OpenAI's API;
    the white part of a mask without transparency, as in `far edit`; or the margins of `outpaint`.

    image, mask: files.
    outpaint: margins, such as "left=16,top=8".
    size: the edit has size x size pixels.
    max_pixels: pixels of the largest picture that is decoded.
    Raises FarError for files that are not pictures or are too large, and where it is unclear what to draw.
    """
    picture = _decode(image, "image", max_pixels)
    image_file = ImageFile(Path("image"), as_picture(picture), _sha256(image))
    if outpaint is not None:
        if mask is not None:
            raise FarError(
                "mask and outpaint exclude each other: a mask says which part to draw, outpaint what to add; use one"
            )
        return out_paint(image_file, parse_margins(outpaint), size)
    if mask is not None:
        mask_picture = _decode(mask, "mask", max_pixels)
        clear = transparent(mask_picture)
        change = as_mask(mask_picture) if clear is None else clear
        return in_paint(image_file, ImageFile(Path("mask"), change, _sha256(mask)), size)
    clear = transparent(picture)
    if clear is None:
        raise FarError(
            "neither mask nor outpaint, and the image has no transparent part; say which part to draw with one of them"
        )
    return in_paint(image_file, ImageFile(Path("image"), clear, image_file.sha256), size)


def _decode(data: bytes, field: str, max_pixels: int) -> Image.Image:
    return open_picture(data, field, field, FORMATS, max_pixels)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
