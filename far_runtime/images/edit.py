"""Edits: a picture with the part of it that is drawn again, fitted to a bundle's size, and the result put together.

What stays is kept as in VAR's zero-shot editing (arXiv 2404.02905, section 5.2), for every system in its own latents
(`KeptRegion` in far_runtime.sampling.base). Outside of the mask the pixels are those of the original picture.
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
"""Width of the transition between the original picture and the drawn one by default, in pixels."""

_HALF = 128
"""The grey from which on a mask's pixel counts as white."""


@dataclass(frozen=True)
class Edit:
    """An edit at a bundle's size."""

    image: NDArray[np.uint8]
    """The original picture [H, W, 3]."""
    change: NDArray[np.bool_]
    """[H, W], True where it is drawn again."""
    source: dict[str, str] = field(default_factory=dict)
    """What the metadata of the new picture says of the original one."""
    notes: tuple[str, ...] = ()
    """What the user should know, such as that the picture was cropped."""

    @property
    def keep(self) -> NDArray[np.bool_]:
        """[H, W], True where the picture stays as it is."""
        return ~self.change


def in_paint(picture: ImageFile, mask: ImageFile, size: int) -> Edit:
    """The edit of a picture, size x size pixels, that draws the white part of a mask again.

    Picture and mask are cropped around the middle to a square and resized: the picture by Lanczos, the mask by
    averaging, where half white counts as white. Raises FarError for a mask of another size than the picture's, and for
    a mask that leaves nothing to change.
    """
    if mask.image.size != picture.image.size:
        raise FarError(
            f"{mask.path}: {mask.size_text} pixels, {picture.path} has {picture.size_text}; draw the mask over the "
            f"picture, at the same size"
        )
    if not (np.asarray(mask.image) >= _HALF).any():
        raise FarError(
            f"{mask.path}: nothing to change: no pixel is white (black and transparent ones are kept); paint "
            f"white what to draw again"
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
    """The edit, size x size pixels, that continues a picture into margins around it.

    The picture is cropped around the middle to the shape that the margins leave, and resized by Lanczos. Raises
    FarError for margins that leave no place for it.
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
    """Pixels by side from "left=64,top=32"; FarError for an unknown or repeated side, for anything but a whole number,
    and where all margins are 0."""
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
    """The drawn pictures [N, H, W, 3] where the edit changes, and everywhere else the original one, bit for bit.

    feather: width of the transition between the two in pixels, inside of the changed part.
    """
    weight = _weight(edit.change, feather)[..., None]
    original = edit.image.astype(np.float32)
    composed: NDArray[np.uint8] = np.rint(original + weight * (drawn - original)).astype(np.uint8)
    return composed


def _weight(change: NDArray[np.bool_], feather: int) -> NDArray[np.float32]:
    """Share of the drawn picture [H, W]: 0 where the original stays, d / (feather + 1) at a distance of d pixels, at
    most 1."""
    layers, inner = [change], change
    for i in range(feather):
        inner = _eroded(inner, corners=i % 2 == 1)
        layers.append(inner)
    weight: NDArray[np.float32] = np.mean(layers, axis=0, dtype=np.float32)
    return weight


def _eroded(change: NDArray[np.bool_], corners: bool) -> NDArray[np.bool_]:
    """The changed pixels [H, W] without those that touch an unchanged pixel at a side, or with `corners` at a corner.

    What lies outside of the picture counts as changed. With and without corners in turn makes octagons, which are
    nearly round.
    """
    padded = np.pad(change, 1, mode="edge")
    height, width = change.shape
    neighbours = [(0, 1), (1, 0), (1, 1), (1, 2), (2, 1)] + ([(0, 0), (0, 2), (2, 0), (2, 2)] if corners else [])
    inner: NDArray[np.bool_] = np.logical_and.reduce([padded[y : y + height, x : x + width] for y, x in neighbours])
    return inner


def _fitted(picture: ImageFile, width: int, height: int) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Pixels [height, width, 3] of the picture's middle, and a note if some of the picture was cut away."""
    image = picture.image
    used = (
        min(image.width, round(image.height * width / height)),
        min(image.height, round(image.width * height / width)),
    )
    cut = (f"{picture.path}: {picture.size_text} pixels, of which the middle {used[0]} x {used[1]} are used",)
    pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    return pixels, cut if used != image.size else ()
