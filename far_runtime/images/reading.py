"""Pictures and masks from files of all formats that Pillow reads, whatever their mode, orientation and transparency."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from far_runtime.errors import FarError, SettingName

MAX_BYTES, MAX_PIXELS = 256 << 20, 64_000_000
"""More than the pictures of any camera; a small file that unpacks to gigabytes is refused before it is unpacked."""

_WHITE, _BLACK = (255, 255, 255, 255), (0, 0, 0, 255)
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass(frozen=True)
class ImageFile:
    """The picture of a file."""

    path: Path
    image: Image.Image
    """The picture, upright and opaque."""
    sha256: str
    """SHA-256 of the file's bytes, in hex."""

    @property
    def size_text(self) -> str:
        """Width and height for messages, as in "640 x 480"."""
        return f"{self.image.width} x {self.image.height}"


def open_picture(
    data: bytes, source: str, name: str, formats: tuple[str, ...] | None = None, most: int = MAX_PIXELS
) -> Image.Image:
    """The picture of a file's bytes, turned upright as its EXIF data says, in its own mode.

    source: what errors call the file.
    name: the setting that the file was given with, for errors.
    formats: the formats that may be tried, by Pillow's names; None for all.
    most: the most pixels that a picture may have.

    Raises FarError for bytes that are no picture, and for a picture that is damaged or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of harmless oddities, and of a size that is checked here
            with Image.open(io.BytesIO(data), formats=formats) as image:
                if image.width * image.height > most:
                    raise Image.DecompressionBombError
                image.load()
                return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise FarError(
            f"{source}: more than {most / 1e6:g} million pixels; give ", SettingName(name), " a smaller picture"
        ) from None
    except Exception as error:  # Pillow's decoders raise almost anything over a damaged file
        reason = "no picture of a known kind" if isinstance(error, UnidentifiedImageError) else str(error)
        raise FarError(
            f"{source}: cannot be read as a picture ({reason}); ", SettingName(name), " takes a PNG or JPEG, say"
        ) from error


def as_picture(image: Image.Image) -> Image.Image:
    """A picture in RGB, on white where it is transparent."""
    return _opaque(image, _WHITE).convert("RGB")


def as_mask(image: Image.Image) -> Image.Image:
    """A picture in greys, on black where it is transparent."""
    return _opaque(image, _BLACK).convert("L")


def transparent(image: Image.Image) -> Image.Image | None:
    """A mask in greys that is white where the picture is transparent (by half or more); None for an opaque picture."""
    if image.mode.startswith("I") and isinstance(image.info.get("transparency"), int):
        clear = np.asarray(image) == image.info["transparency"]
    elif image.mode in _WITH_ALPHA or "transparency" in image.info:
        clear = np.asarray(image.convert("RGBA").getchannel("A")) < 128
    else:
        return None
    return Image.fromarray(np.where(clear, 255, 0).astype(np.uint8)) if clear.any() else None


def read_picture(path: Path, name: str = "image") -> ImageFile:
    """The picture of a file in RGB, turned upright as its EXIF data says, on white where it is transparent.

    Of several frames it is the first. Raises FarError, naming the setting, for a file that is missing, no picture,
    damaged or too large.
    """
    return _read(path, SettingName(name), as_picture)


def read_mask(path: Path, name: str = "mask") -> ImageFile:
    """The mask of a file in greys, on black where it is transparent; otherwise as `read_picture`."""
    return _read(path, SettingName(name), as_mask)


def _read(path: Path, name: str, convert: Callable[[Image.Image], Image.Image]) -> ImageFile:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise FarError(f"{path}: no such file; ", name, " takes a picture, a PNG or JPEG, say") from None
    except OSError as error:
        raise FarError(f"{path}: cannot be read ({error.strerror}); ", name, " takes a picture file") from error
    if len(data) > MAX_BYTES:
        raise FarError(f"{path}: larger than {MAX_BYTES >> 20} MB; give ", name, " a smaller picture")
    image = convert(open_picture(data, str(path), name))
    return ImageFile(path, image, hashlib.sha256(data).hexdigest())


def _opaque(image: Image.Image, paper: tuple[int, int, int, int]) -> Image.Image:
    """A picture in RGB, on paper of this colour where it is transparent."""
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image.convert("RGB")
    sheet = Image.new("RGBA", image.size, paper)
    sheet.alpha_composite(image.convert("RGBA"))
    return sheet.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits in 8 bits, which Pillow would cut off. Its 32-bit mode may hold 16 or 8 bits."""
    values = np.asarray(image)
    if image.mode != "I" or values.max() > 255:
        values = (np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
