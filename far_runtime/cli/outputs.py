"""The files that `far generate` and `far edit` write."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from far_runtime.errors import FarError
from far_runtime.generation import Generation
from far_runtime.images.writing import (
    Pixels,
    check_animation,
    file_name,
    picture_grid,
    save_animation,
    save_picture,
    save_plain,
    save_sheet,
)
from far_runtime.storage.atomic import check_distinct, check_file, check_folder


@dataclass(frozen=True)
class Outputs:
    """The files of one generation."""

    sheet: Path
    """PNG file: a contact sheet, or the picture itself where there is only one."""

    each: Path | None = None
    """Folder for a PNG file per picture."""

    levels: tuple[Path, Path] | None = None
    """Strip (PNG) and animation (WebP) of the steps from low to high frequency."""

    def check(self, rows: int, columns: int, height: int, width: int) -> None:
        """FarError, naming the option, where a file cannot be written; makes missing folders.

        The levels are an animation of `rows` x `columns` pictures of `height` x `width` pixels.
        """
        check_sheet(self.sheet)
        check_file(self.sheet, "-o")
        if self.each is not None:
            check_folder(self.each, "--each")
        if self.levels is not None:
            check_animation(rows, columns, height, width)
            for path in self.levels:
                check_file(path, "--save-levels")

    def check_distinct(self, names: Iterable[str], like: Path | None = None) -> None:
        """FarError where a file would be written twice, or would replace the picture that --like repeats.

        names: file names in the folder `each`.
        """
        files = [("-o", self.sheet), *(("--save-levels", path) for path in self.levels or ())]
        if self.each is not None:
            files += [("--each", self.each / name) for name in names]
        check_distinct(files, {} if like is None else {"--like": like})


def check_sheet(path: Path) -> None:
    """FarError unless `path` is the name of a PNG file."""
    if path.suffix.lower() == ".png":
        return
    if path.name in ("", "..") or path.is_dir():
        raise FarError(f"{path}: is a folder; name a file with -o {path / 'out.png'}, say")
    raise FarError(f"{path}: is written as PNG; use -o {path.with_suffix('.png')}, say")


def level_files(prefix: str, sheet: Path) -> tuple[Path, Path]:
    """Paths of strip and animation: PREFIX.png and .webp, DIR/levels.png and .webp, or beside the sheet."""
    if not prefix:
        path = sheet.with_name(f"{sheet.stem}-levels")
    elif prefix.endswith(("/", os.sep)) or Path(prefix).is_dir():
        path = Path(prefix) / "levels"
    else:
        path = Path(prefix)
        if path.suffix.lower() in (".png", ".webp"):
            path = path.with_suffix("")
    return path.with_name(path.name + ".png"), path.with_name(path.name + ".webp")


def write(generation: Generation, columns: int, outputs: Outputs) -> list[str]:
    """Write all files, with `columns` pictures in a row; returns a line about each file or folder."""
    count = len(generation.settings)
    if count == 1:
        save_picture(outputs.sheet, generation.images[0], generation.settings[0])
    else:
        save_sheet(outputs.sheet, _sheet(generation, generation.images, columns), generation.settings)
    lines = [f"{outputs.sheet}: {'the picture' if count == 1 else f'contact sheet of {count} pictures'}"]
    if outputs.each is not None:
        for pixels, settings in zip(generation.images, generation.settings, strict=True):
            save_picture(outputs.each / file_name(settings), pixels, settings)
        lines.append(f"{outputs.each}: {count} PNG {'file' if count == 1 else 'files'}, each with its settings")
    if outputs.levels is not None and generation.level_images is not None:
        lines += write_levels(generation, columns, *outputs.levels)
    return lines


def write_levels(generation: Generation, columns: int, strip: Path, animation: Path) -> list[str]:
    """Write the steps from low to high frequency; the animation has `columns` pictures in a row.

    Returns a line about each file. ValueError for pictures that were drawn without `save_levels`.
    """
    if generation.level_images is None:
        raise ValueError("these pictures were drawn without save_levels")
    captions = [f"{metadata.caption}\nseed {metadata.seed}" for metadata in generation.settings]
    names = generation.step_names[-generation.level_images.shape[1] :]
    save_plain(strip, picture_grid(generation.level_images, captions, names))
    save_animation(animation, [_sheet(generation, generation.level_images[:, i], columns) for i in range(len(names))])
    return [f"{strip}: the way to the picture in {len(names)} steps", f"{animation}: the same as an animation"]


def _sheet(generation: Generation, images: Pixels, columns: int) -> Image.Image:
    """Sheet of images uint8 [N, H, W, 3], a row per subject and a column per seed; a single one has no captions."""
    rows = images.reshape(-1, columns, *images.shape[1:])
    if len(images) == 1:
        return picture_grid(rows, [""], [""])
    labels = [
        metadata.name if metadata.label is None else f"{metadata.label}\n{metadata.name}"
        for metadata in generation.settings[::columns]
    ]
    return picture_grid(rows, labels, [f"seed {metadata.seed}" for metadata in generation.settings[:columns]])
