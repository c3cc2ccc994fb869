"""Edits over the API: what was sent becomes a picture of the model's size and the part of it to draw anew.

A sent file is decoded to pixels, and what is sent back is encoded from pixels: nothing else of it goes on.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image

from far_runtime.errors import FarError
from far_runtime.images.edit import Edit, in_paint, out_paint, parse_margins
from far_runtime.images.reading import ImageFile, as_mask, as_picture, open_picture, transparent

FORMATS = ("PNG", "JPEG", "WEBP")
"""What may be sent: few decoders, all of them much used."""


def edit_of(image: bytes, mask: bytes | None, outpaint: str | None, size: int, most: int) -> Edit:
    """The edit at size x size pixels. most: pixels of a sent picture.

    As OpenAI's API has it, the transparent part of the mask is drawn anew, or of the picture where there is no mask; as
    `far edit` has it, the white part of a mask that is transparent nowhere. Raises FarError for what is no picture, too
    large, and where it is not plain what to draw.
    """
    picture = _decoded(image, "image", most)
    given = ImageFile(Path("image"), as_picture(picture), _digest(image))
    if outpaint is not None:
        if mask is not None:
            raise FarError(
                "mask and outpaint are both given; a mask says what to draw anew, outpaint what to add: use one"
            )
        return out_paint(given, parse_margins(outpaint), size)
    if mask is not None:
        drawn = _decoded(mask, "mask", most)
        clear = transparent(drawn)
        return in_paint(given, ImageFile(Path("mask"), as_mask(drawn) if clear is None else clear, _digest(mask)), size)
    clear = transparent(picture)
    if clear is None:
        raise FarError("neither mask nor outpaint, and the image is transparent nowhere; say what to draw anew")
    return in_paint(given, ImageFile(Path("image"), clear, given.sha256), size)


def _decoded(data: bytes, field: str, most: int) -> Image.Image:
    return open_picture(data, field, field, FORMATS, most)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
