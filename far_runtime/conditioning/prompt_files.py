"""Prompt files of text-to-image benchmarks, and the file names that the benchmarks' scorers expect."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from far_runtime.errors import FarError, SettingName
from far_runtime.storage.atomic import whole_file

GENEVAL_SAMPLES = 4
"""Pictures of each prompt of GenEval."""
COCO_COUNT = 30_000
"""Images of COCO whose captions are drawn."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file, with the files to write."""

    kind: str
    """What the file has: "GenEval", "COCO captions" or "lines of text"."""
    digest: str
    """Hash of the file and the number of pictures per prompt, 16 hex digits."""
    prompts: tuple[str, ...]
    """The prompt of every picture."""
    names: tuple[str, ...]
    """The file of every picture, relative to the output folder."""
    notes: dict[str, str]
    """Text of the further files that the scorer reads, by name."""

    def write_notes(self, folder: Path) -> None:
        """Write the further files."""
        for name, text in self.notes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as aside:
                aside.write_text(text, encoding="utf-8")


def read_prompts(path: Path, count: int | None, samples: int | None) -> PromptSet:
    """The prompts of a file, whose format its name's ending tells; FarError for a file of another format.

    `.jsonl` is GenEval's evaluation_metadata.jsonl, whose lines are JSON objects with "prompt". Picture k of prompt i
    is i/samples/k.png (five and four digits), beside i/metadata.jsonl.

    `.json` is COCO's captions file, {"annotations": [{"image_id", "id", "caption"}]}. Every image has one caption, the
    one with the smallest id. The images are in the order of the SHA-256 of their ids; files are named by these ids.

    Any other file has one prompt per line.

    count: how many prompts are taken, from the first on; None for all, with COCO for 30,000.
    samples: pictures per prompt; None for the benchmark's own number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FarError(SettingName("prompts"), f" {path}: cannot be read as text ({error})") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        kind, samples, rows = "GenEval", samples or GENEVAL_SAMPLES, _geneval(path, lines[:count])
    elif path.suffix == ".json":
        kind, samples, rows = "COCO captions", samples or 1, _coco(path, text)[: count or COCO_COUNT]
    else:
        kind, samples = "lines of text", samples or 1
        rows = [(f"{i:05d}", line.strip(), line.strip()) for i, line in enumerate(lines[:count])]
    if not rows:
        raise FarError(
            SettingName("prompts"), f" {path}: has no prompts; expected one a line, or those of GenEval or COCO"
        )
    if path.suffix == ".jsonl":
        names = [f"{name}/samples/{k:04d}.png" for name, _, _ in rows for k in range(samples)]
        notes = {f"{name}/metadata.jsonl": note + "\n" for name, _, note in rows}
    else:
        names = [f"{name}.png" if samples == 1 else f"{name}-{k}.png" for name, _, _ in rows for k in range(samples)]
        notes = {"prompts.json": json.dumps({name: prompt for name, prompt, _ in rows}, indent=0) + "\n"}
    digest = hashlib.sha256(f"{samples} {text}".encode()).hexdigest()[:16]
    prompts = tuple(prompt for _, prompt, _ in rows for _ in range(samples))
    return PromptSet(kind=kind, digest=digest, prompts=prompts, names=tuple(names), notes=notes)


def _geneval(path: Path, lines: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, prompt and metadata (the line itself) of every prompt."""
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
    """Name, caption and again the caption of every image."""
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
