"""Build a labelled picture set from free emoji drawings: class = concept, several drawing styles of each.

    python scripts/zoo/prepare_emoji.py -o data/emoji --size 64 --concepts 64
    python scripts/zoo/prepare_emoji.py -o data/emoji-all --size 64 --concepts all

Rows follow the classes, and within a class the styles. The folder holds

    images.npy     uint8 [N, size, size, 3], on white
    labels.npy     int64 [N], class of each picture: an index into names.json and concepts.json
    styles.npy     int64 [N], drawing style of each picture: an index into styles.json
    names.json     class names; concepts.json: emoji, hexcode, tags, group; styles.json: package, version, licence
    split.json     {"train": rows, "held_out": rows}
    meta.json      size, counts, options, versions, SHA-256 of the pixels
    sheet.png      every picture, up to 256 classes

Needs npm (or the tarballs in --cache) and resvg-py. Nothing that is downloaded is executed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoji_choice import choose_concepts, held_out_pairs, read_curated
from emoji_match import Drawing, Emoji, bitmap_drawings, iconify_drawings, iconify_names, read_emoji, read_odd_names
from emoji_raster import contact_sheet, rasterise
from emoji_sources import EMOJIBASE, STYLES, fetch
from far_runtime.cli.option_names import with_options
from far_runtime.errors import FarError
from far_runtime.storage.atomic import whole_folder

HERE = Path(__file__).resolve().parent
FORMAT = 1
MOST_CLASSES_ON_A_SHEET = 256
# Packages whose table of characters explains the names of packages that have none.
NAMING_STYLES = ("noto", "twemoji", "fluent-flat")
# Mozilla named its icons after Unicode, the others after CLDR.
UNICODE_NAMED = ("fxemoji",)
BITMAPS = ("fluent-3d",)


def load_drawings(styles: Sequence[str], cache: Path) -> tuple[dict[str, Emoji], dict[str, dict[str, Drawing]]]:
    """All emoji by key, and style -> key -> drawing; fetches what `cache` lacks."""
    emoji = read_emoji(fetch(EMOJIBASE, cache))
    odd = read_odd_names(HERE / "emoji_names.txt")
    other_names: dict[str, str] = {}
    for style in NAMING_STYLES:
        for name, key in iconify_names(fetch(STYLES[style], cache)):
            if key in emoji:
                other_names.setdefault(name, key)
    drawings = {}
    for style in styles:
        tarball = fetch(STYLES[style], cache)
        if style in BITMAPS:
            drawings[style] = bitmap_drawings(tarball, emoji)
        else:
            first = "unicode" if style in UNICODE_NAMED else "label"
            drawings[style] = iconify_drawings(tarball, emoji, other_names, odd.get(style, {}), first)
        print(f"{style}: {len(drawings[style])} drawings", flush=True)
    return emoji, drawings


def draw(
    pairs: Sequence[tuple[str, str]], drawings: Mapping[str, Mapping[str, Drawing]], size: int, jobs: int
) -> list[NDArray[np.uint8] | None]:
    """Pictures of (key, style) pairs in their order; None for a blank one."""
    sources = [drawings[style][key] for key, style in pairs]
    where = [f"{style} {key}" for key, style in pairs]
    if jobs == 1:
        return [rasterise(source, size, name) for source, name in zip(sources, where, strict=True)]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(rasterise, sources, [size] * len(pairs), where, chunksize=32))


def build(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the whole data set into `folder` and return its meta data."""
    styles = [style for style in STYLES if style in (args.styles or STYLES)]
    emoji, drawings = load_drawings(styles, args.cache)
    curated = read_curated(HERE / "emoji_concepts.txt", emoji)
    wanted = choose_concepts(emoji, drawings, args.concepts, args.min_styles, curated)
    asked = [(key, style) for key in wanted for style in styles if key in drawings[style]]
    drawn = zip(asked, draw(asked, drawings, args.size, args.jobs), strict=True)
    rows = [(pair, picture) for pair, picture in drawn if picture is not None]
    if not rows:
        raise FarError("not one picture was left; give more --styles or --concepts")
    pairs = [pair for pair, _ in rows]
    label_of = {key: label for label, key in enumerate(dict.fromkeys(key for key, _ in pairs))}
    images = np.stack([picture for _, picture in rows])
    labels = np.array([label_of[key] for key, _ in pairs], np.int64)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "styles.npy", np.array([list(STYLES).index(style) for _, style in pairs], np.int64))
    write_json(folder / "names.json", [emoji[key].label for key in label_of])
    write_json(folder / "concepts.json", [asdict(emoji[key]) for key in label_of])
    write_json(folder / "styles.json", [{"style": style, **asdict(package)} for style, package in STYLES.items()])
    held = held_out_pairs(pairs, args.holdout)
    split = {
        "train": [row for row, pair in enumerate(pairs) if pair not in held],
        "held_out": [row for row, pair in enumerate(pairs) if pair in held],
    }
    write_json(folder / "split.json", split)
    meta = {
        "format": FORMAT,
        "size": args.size,
        "pictures": len(pairs),
        "concepts": len(label_of),
        "train": len(split["train"]),
        "held_out": len(split["held_out"]),
        "blank_left_out": len(asked) - len(pairs),
        "pictures_per_style": {style: sum(pair[1] == style for pair in pairs) for style in styles},
        "options": {
            "concepts": args.concepts or "all",
            "styles": styles,
            "min_styles": args.min_styles if args.concepts else 1,
            "holdout": args.holdout,
        },
        "names_from": asdict(EMOJIBASE),
        "drawn_with": {name: installed(name) for name in ("resvg-py", "Pillow", "numpy")},
        "images_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
    }
    write_json(folder / "meta.json", meta)
    if len(label_of) <= MOST_CLASSES_ON_A_SHEET:
        contact_sheet(images, labels).save(folder / "sheet.png")
    return meta


def installed(name: str) -> str | None:
    """Version of an installed distribution, None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_json(path: Path, value: object) -> None:
    """Readable JSON with the emoji themselves in it."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def concept_count(text: str) -> int | None:
    """`--concepts`: a positive number, None for 'all'."""
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a positive number or 'all', found {text!r}")
    return None if text == "all" else int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="Build a picture set from free emoji drawings.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write; an older set is replaced")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (default 64)")
    parser.add_argument("--concepts", type=concept_count, default=64, help="number of classes, or 'all' (default 64)")
    parser.add_argument("--styles", nargs="+", choices=list(STYLES), metavar="STYLE", help=f"of {', '.join(STYLES)}")
    parser.add_argument("--min-styles", type=int, default=6, help="styles that a class has at least (default 6)")
    parser.add_argument("--holdout", type=int, default=8, help="hold out a style of one concept in so many; 0: none")
    parser.add_argument("--cache", type=Path, default=Path("data/npm"), help="where tarballs are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that draw")
    args = parser.parse_args(argv)
    if not 8 <= args.size <= 256:
        parser.error("argument --size: expected 8 to 256, for the bitmaps have 256")
    if args.holdout < 0 or args.min_styles < 1 or args.jobs < 1:
        parser.error("--holdout must not be below 0, --min-styles and --jobs not below 1")
    return args


def check_replaceable(folder: Path) -> None:
    """FarError for a folder that holds anything but a picture set."""
    if folder.exists() and not (folder / "meta.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FarError(f"{folder} exists and is no picture set; choose another folder with -o")


def main(argv: Sequence[str] | None = None) -> int:
    """Build the picture set; 0, or 2 with one line on stderr."""
    args = parse(argv)
    output: Path = args.output
    try:
        with whole_folder(output, check_replaceable=check_replaceable) as folder:
            meta = build(args, folder)
    except (FarError, OSError) as error:
        print(f"prepare_emoji: {with_options(error) if isinstance(error, FarError) else error}", file=sys.stderr)
        return 2
    print(f"{output}: {meta['pictures']} pictures, {meta['concepts']} concepts, {meta['held_out']} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
