"""The examples of docs/editing.md: run the three commands on a bundle of models/zoo/far-emoji-64 and draw a sheet.

python scripts/zoo/edit_examples.py BUNDLE -o docs/edit.png
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from far_runtime.cli.main import cli
from far_runtime.images.edit import in_paint, out_paint, parse_margins
from far_runtime.images.reading import read_mask, read_picture
from far_runtime.images.writing import picture_grid, save_plain

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ROOT / "docs" / "edit"
COUNT = 4
GREY = 170


@dataclass(frozen=True)
class Example:
    """A command of `far edit`; file names are relative to docs/edit."""

    caption: str

    image: str
    """File name of the picture."""

    mask: str | None = None
    """File name of the mask; None for out-painting."""

    outpaint: str | None = None
    """The value of --outpaint; None where there is a mask."""

    label: str | None = None

    def arguments(self) -> list[str]:
        """Options of `far edit`, without those for its output."""
        options = ["--image", str(INPUTS / self.image)]
        options += ["--mask", str(INPUTS / self.mask)] if self.mask else ["--outpaint", str(self.outpaint)]
        return [*options, *(["--label", self.label] if self.label else []), "--seed", "0", "--count", str(COUNT)]

    def before(self, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The picture at the bundle's size on white, and the same with grey for the redrawn part."""
        picture = read_picture(INPUTS / self.image)
        if self.mask:
            edit = in_paint(picture, read_mask(INPUTS / self.mask), size)
            picture_at_size = edit.image
        else:
            edit = out_paint(picture, parse_margins(self.outpaint or ""), size)
            picture_at_size = np.where(edit.change[..., None], np.uint8(255), edit.image)
        return picture_at_size, np.where(edit.change[..., None], np.uint8(GREY), edit.image)


EXAMPLES = (
    Example("in-painting,\nno class", "apple.png", mask="apple-mask.png"),
    Example("out-painting,\npanda", "panda-top.png", outpaint="bottom=28", label="panda"),
    Example(
        "edit to another class,\nloudly crying face",
        "grinning-face.png",
        mask="grinning-face-mask.png",
        label="loudly crying face",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "edit.png")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, example in enumerate(EXAMPLES):
            each = Path(folder) / str(i)
            command = ["edit", str(options.bundle), *example.arguments(), "--each", str(each)]
            cli.main(args=[*command, "-o", str(Path(folder) / "sheet.png")], prog_name="far", standalone_mode=False)
            drawn = [np.asarray(Image.open(path)) for path in sorted(each.iterdir())]
            rows.append(np.stack([*example.before(len(drawn[0])), *drawn]))
    names = ["picture", "drawn anew", *(f"seed {i}" for i in range(COUNT))]
    sheet = picture_grid(np.stack(rows), [example.caption for example in EXAMPLES], names)
    save_plain(options.output, sheet.quantize(256, dither=Image.Dither.NONE))


if __name__ == "__main__":
    main()
