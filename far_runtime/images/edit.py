"""Edits: a picture and the part of it to draw anew, fitted to a bundle, and the drawn pictures put into it.

The known part is kept as VAR's zero-shot editing does it (arXiv 2404.02905, section 5.2), for every system in its own
latents (`KeptRegion` in far_runtime.sampling.base); outside of the mask the pixels are those of the given picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from far_runtime.errors import FarError, SettingName
from far_runtime.images.reading import ImageFile

SIDES = ("left", "right", "top", "bottom")
FEATHER = 1
"""Pixels of transition by default."""

_HALF = 128


@dataclass(frozen=True)
class Edit:
    """An edit at a bundle's size.

    image: uint8 [H, W, 3], the given picture. change: bool [H, W], True where it is drawn anew. source: what a
    picture's settings record of it. notes: what happened to the picture on the way.
    """

    image: NDArray[np.uint8]
    change: NDArray[np.bool_]
    source: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def keep(self) -> NDArray[np.bool_]:
        """[H, W], True where the picture stays."""
        return ~self.change


def in_paint(picture: ImageFile, mask: ImageFile, size: int) -> Edit:
    """The white part of a mask is drawn anew, at size x size pixels.

    Picture and mask are cropped around the middle to a square and resized, the picture by Lanczos, the mask by
    averages, of which half white counts as white. Raises FarError for a mask of another size than the picture's, and
    for one that leaves nothing to change.
    """
    if mask.image.size != picture.image.size:
        raise FarError(
            f"{mask.path}: {mask.size_text} pixels, {picture.path} has {picture.size_text}; draw the mask over the "
            f"picture, at the same size"
        )
    if not (np.asarray(mask.image) >= _HALF).any():
        raise FarError(
            f"{mask.path}: nothing to change: no pixel is white (black and transparent ones are kept); paint "
            f"white what is to be drawn anew"
        )
    change = np.asarray(ImageOps.fit(mask.image, (size, size), Image.Resampling.BOX)) >= _HALF
    if not change.any():
        raise FarError(
            f"{mask.path}: nothing to change at {size} x {size} pixels: its white part is too thin, or outside of the "
            f"square that is used; paint more of it"
        )
    pixels, notes = _fitted(picture, size, size)
    return Edit(pixels, change, {"image": picture.sha256, "mask": mask.sha256}, notes)


def out_paint(picture: ImageFile, margins: Mapping[str, int], size: int) -> Edit:
    """The picture, shrunk into what margins leave of size x size pixels, is continued into the margins.

    It is cropped around the middle to the shape of its place and resized by Lanczos. Raises FarError for margins that
    leave no picture.
    """
    left, right, top, bottom = (margins.get(side, 0) for side in SIDES)
    width, height = size - left - right, size - top - bottom
    if width < 1 or height < 1:
        raise FarError(
            SettingName("outpaint"),
            f" {margins_text(margins)}: leaves no picture of {size} x {size} pixels; use smaller margins",
        )
    inner, notes = _fitted(picture, width, height)
    around = ((top, bottom), (left, right))
    # The encoder sees the margins too; a mirrored picture changes the kept latents least (docs/editing.md has numbers).
    pixels = np.pad(inner, (*around, (0, 0)), mode="symmetric")
    change = np.pad(np.zeros((height, width), np.bool_), around, constant_values=True)
    return Edit(pixels, change, {"image": picture.sha256, "outpaint": margins_text(margins)}, notes)


def parse_margins(text: str) -> dict[str, int]:
    """Pixels by side from "left=64,top=32"; FarError for an unknown or repeated side, a number that is none, and where
    nothing is to be added."""
    name = SettingName("outpaint")

    def refused(reason: str) -> FarError:
        return FarError(name, f" {text}: {reason}; use ", name, " left=16,right=16, say")

    margins: dict[str, int] = {}
    for part in text.split(","):
        side, _, number = (word.strip() for word in part.partition("="))
        if side not in SIDES:
            raise refused(f"side {side!r}; expected {', '.join(SIDES)}")
        if side in margins:
            raise refused(f"{side} is there twice")
        if not number.isascii() or not number.isdigit():
            raise refused(f"{side}={number}; expected a number of pixels, 0 or more")
        margins[side] = int(number[:9])  # more digits than any picture has pixels
    if not any(margins.values()):
        raise refused("adds nothing to the picture")
    return margins


def margins_text(margins: Mapping[str, int]) -> str:
    """Margins as `parse_margins` reads them."""
    return ",".join(f"{side}={margins[side]}" for side in SIDES if side in margins)


def compose(drawn: NDArray[np.uint8], edit: Edit, feather: int = FEATHER) -> NDArray[np.uint8]:
    """Drawn pictures [N, H, W, 3] where the edit changes, the given picture everywhere else, to the last bit.

    feather: width in pixels of the transition between the two, inside of the changed part.
    """
    weight = _weight(edit.change, feather)[..., None]
    given = edit.image.astype(np.float32)
    mixed: NDArray[np.uint8] = np.rint(given + weight * (drawn - given)).astype(np.uint8)
    return mixed


def _weight(change: NDArray[np.bool_], feather: int) -> NDArray[np.float32]:
    """Share of the drawn picture [H, W]: 0 where the given one stays, d / (feather + 1) at d pixels from there, at most
    1."""
    layers, inner = [change], change
    for i in range(feather):
        inner = _eroded(inner, corners=i % 2 == 1)
        layers.append(inner)
    weight: NDArray[np.float32] = np.mean(layers, axis=0, dtype=np.float32)
    return weight


def _eroded(change: NDArray[np.bool_], corners: bool) -> NDArray[np.bool_]:
    """Without the pixels that touch an unchanged one at a side (or a corner); the picture's border is not one. Taking
    turns makes octagons, which are nearly round."""
    padded = np.pad(change, 1, mode="edge")
    height, width = change.shape
    neighbours = [(0, 1), (1, 0), (1, 1), (1, 2), (2, 1)] + ([(0, 0), (0, 2), (2, 0), (2, 2)] if corners else [])
    inner: NDArray[np.bool_] = np.logical_and.reduce([padded[y : y + height, x : x + width] for y, x in neighbours])
    return inner


def _fitted(picture: ImageFile, width: int, height: int) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Pixels [height, width, 3] of the picture's middle, and a note where some of it was cut away."""
    image = picture.image
    used = (
        min(image.width, round(image.height * width / height)),
        min(image.height, round(image.width * height / width)),
    )
    cut = (f"{picture.path}: {picture.size_text} pixels, of which the middle {used[0]} x {used[1]} are used",)
    pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    return pixels, cut if used != image.size else ()
