"""From a drawing to pixels: white background, drawn large and shrunk, so that edges stay crisp."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from emoji_match import Drawing
from far_runtime.errors import FarError

SUPERSAMPLE = 4


def rasterise(drawing: Drawing, size: int, name: str = "") -> NDArray[np.uint8] | None:
    """Picture of a drawing on white, uint8 [size, size, 3]; None if nothing is to be seen. `name` is for the error."""
    try:
        if drawing.kind == "svg":
            picture = draw_svg(drawing.data.decode(), size * SUPERSAMPLE)
        else:
            picture = Image.open(io.BytesIO(drawing.data)).convert("RGBA")
    except (OSError, ValueError) as error:
        raise FarError(f"{name}: the drawing cannot be read ({error})") from error
    if drawing.mirrored:
        picture = ImageOps.mirror(picture)
    canvas = Image.new("RGBA", (max(picture.size),) * 2, "white")
    place = ((canvas.width - picture.width) // 2, (canvas.height - picture.height) // 2)
    canvas.alpha_composite(picture, place)
    pixels = np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
    return None if int(pixels.min()) > 250 else pixels


def draw_svg(text: str, size: int) -> Image.Image:
    """RGBA picture of an SVG document in a square of `size` pixels, proportions kept."""
    try:
        import resvg_py
    except ImportError as error:
        raise FarError("resvg-py is not installed; it draws the SVG files: pip install 'far-deploy[train]'") from error

    sized = text.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=sized)))).convert("RGBA")


def contact_sheet(images: NDArray[np.uint8], labels: NDArray[np.int64], gap: int = 4) -> Image.Image:
    """All pictures on grey, a cell for each concept, as nearly square as that goes; images [N, s, s, 3], labels [N]."""
    size = images.shape[1]
    classes = int(labels.max()) + 1
    widest = int(np.bincount(labels).max())
    columns = max(1, round((classes / widest) ** 0.5))
    rows = -(-classes // columns)
    cell = widest * size + 3 * gap
    sheet = np.full((rows * (size + gap) + gap, columns * cell + gap, 3), 225, np.uint8)
    for label in range(classes):
        top, left = gap + label // columns * (size + gap), gap + label % columns * cell
        for place, picture in enumerate(images[labels == label]):
            sheet[top : top + size, left + place * size : left + (place + 1) * size] = picture
    return Image.fromarray(sheet)
