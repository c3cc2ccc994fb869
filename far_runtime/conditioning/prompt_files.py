"""Prompt files of text-to-image benchmarks, and the folders that their scorers read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from far_runtime.errors import FarError, SettingName
from far_runtime.storage.atomic import whole_file

GENEVAL_SAMPLES = 4
COCO_COUNT = 30_000


@dataclass(frozen=True)
class PromptSet:
    """Prompts to draw. kind: GenEval, COCO captions or lines of text. digest: of the file and the pictures a prompt.
    prompts: the prompt of every picture. names: of their files, relative to the output folder. notes: further files, by
    name, that the scorer reads."""

    kind: str
    digest: str
    prompts: tuple[str, ...]
    names: tuple[str, ...]
    notes: dict[str, str]

    def write_notes(self, folder: Path) -> None:
        """Write the further files."""
        for name, text in self.notes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as aside:
                aside.write_text(text, encoding="utf-8")


def read_prompts(path: Path, count: int | None, samples: int | None) -> PromptSet:
    """The prompts of a benchmark's file; FarError for any other.

    `.jsonl`: GenEval's evaluation_metadata.jsonl, an object with "prompt" a line; picture k of prompt i is
    i/samples/k.png (five digits, four digits), beside i/metadata.jsonl: four pictures a prompt unless `samples` says
    otherwise. `.json`: COCO's captions, {"annotations": [{"image_id", "id", "caption"}]}; one caption an image, the one
    with the smallest id, of `count` images (30,000 by default) in the order of the SHA-256 of their ids; files are
    named by the image's id. Any other name: a prompt a line. count: of prompts, the first ones, so that a larger one
    only adds pictures.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FarError(SettingName("prompts"), f" {path}: cannot be read as text ({error})") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        kind, each, rows = "GenEval", samples or GENEVAL_SAMPLES, _geneval(path, lines[:count])
    elif path.suffix == ".json":
        kind, each, rows = "COCO captions", samples or 1, _coco(path, text)[: count or COCO_COUNT]
    else:
        kind, each = "lines of text", samples or 1
        rows = [(f"{i:05d}", line.strip(), line.strip()) for i, line in enumerate(lines[:count])]
    if not rows:
        raise FarError(
            SettingName("prompts"), f" {path}: has no prompts; expected one a line, or those of GenEval or COCO"
        )
    if path.suffix == ".jsonl":
        names = [f"{name}/samples/{k:04d}.png" for name, _, _ in rows for k in range(each)]
        notes = {f"{name}/metadata.jsonl": note + "\n" for name, _, note in rows}
    else:
        names = [f"{name}.png" if each == 1 else f"{name}-{k}.png" for name, _, _ in rows for k in range(each)]
        notes = {"prompts.json": json.dumps({name: prompt for name, prompt, _ in rows}, indent=0) + "\n"}
    digest = hashlib.sha256(f"{each} {text}".encode()).hexdigest()[:16]
    return PromptSet(kind, digest, tuple(prompt for _, prompt, _ in rows for _ in range(each)), tuple(names), notes)


def _geneval(path: Path, lines: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, prompt and metadata of every line."""
    rows = []
    for i, line in enumerate(lines):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, LookupError, TypeError) as error:
            raise FarError(
                SettingName("prompts"),
                f' {path}: line {i + 1} is no JSON object with "prompt", as in evaluation_metadata.jsonl',
            ) from error
        rows.append((f"{i:05d}", str(prompt), line.strip()))
    return rows


def _coco(path: Path, text: str) -> list[tuple[str, str, str]]:
    """Name, caption and caption of every image."""
    captions: dict[int, tuple[int, str]] = {}
    try:
        for annotation in json.loads(text)["annotations"]:
            image, number, caption = int(annotation["image_id"]), int(annotation["id"]), str(annotation["caption"])
            if image not in captions or number < captions[image][0]:
                captions[image] = (number, " ".join(caption.split()))
    except (ValueError, LookupError, TypeError) as error:
        raise FarError(
            SettingName("prompts"),
            f' {path}: no COCO captions ({error!r}); expected "annotations" with image_id, id and caption',
        ) from error
    order = sorted(captions, key=lambda image: hashlib.sha256(str(image).encode()).digest())
    return [(f"{image:012d}", captions[image][1], captions[image][1]) for image in order]
