"""Prompt files of text-to-image benchmarks, and the folders that their scorers read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from far_runtime.errors import FarError
from far_runtime.files import whole_file

GENEVAL_SAMPLES = 4
COCO_COUNT = 30_000


@dataclass(frozen=True)
class PromptSet:
    """Prompts to draw. kind: geneval, coco or text. names: of every picture's file, relative to the output folder.
    prompts: the prompt of every picture. notes: further files, by name, that the scorer reads."""

    kind: str
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
    i/samples/k.png (five digits each), beside i/metadata.jsonl: four pictures a prompt unless `samples` says otherwise.
    `.json`: COCO's captions, {"images": .., "annotations": [{"image_id", "caption"}]}; one caption an image, the one
    with the smallest id, `count` images (30,000 by default) in a fixed random order; files are named by the image's id.
    Any other name: a prompt a line. count: of prompts.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FarError(f"--prompts {path}: cannot be read as text ({error})") from error
    if path.suffix == ".jsonl":
        return _geneval(path, text, count, samples or GENEVAL_SAMPLES)
    if path.suffix == ".json":
        return _coco(path, text, count or COCO_COUNT, samples or 1)
    lines = [line.strip() for line in text.splitlines() if line.strip()][:count]
    if not lines:
        raise FarError(f"--prompts {path}: has no prompts; expected one a line")
    names = [f"{i:05d}" for i in range(len(lines))]
    notes = {"prompts.txt": "".join(line + "\n" for line in lines)}
    return _repeated("text", lines, names, samples or 1, notes)


def _geneval(path: Path, text: str, count: int | None, samples: int) -> PromptSet:
    lines = [line for line in text.splitlines() if line.strip()][:count]
    prompts, names, notes = [], [], {}
    for i, line in enumerate(lines):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, LookupError, TypeError) as error:
            raise FarError(
                f'--prompts {path}: line {i + 1} is no JSON object with "prompt", as in evaluation_metadata.jsonl'
            ) from error
        prompts += [str(prompt)] * samples
        names += [f"{i:05d}/samples/{k:05d}.png" for k in range(samples)]
        notes[f"{i:05d}/metadata.jsonl"] = line + "\n"
    if not prompts:
        raise FarError(f"--prompts {path}: has no prompts")
    return PromptSet("geneval", tuple(prompts), tuple(names), notes)


def _coco(path: Path, text: str, count: int, samples: int) -> PromptSet:
    try:
        found: dict[str, Any] = json.loads(text)
        captions: dict[int, tuple[int, str]] = {}
        for annotation in found["annotations"]:
            image, number, caption = int(annotation["image_id"]), int(annotation["id"]), str(annotation["caption"])
            if image not in captions or number < captions[image][0]:
                captions[image] = (number, " ".join(caption.split()))
    except (ValueError, LookupError, TypeError) as error:
        raise FarError(
            f'--prompts {path}: no COCO captions ({error!r}); expected "annotations" with image_id, id and caption'
        ) from error
    images = sorted(captions)
    order = np.random.default_rng(0).permutation(len(images))[:count]
    chosen = [images[i] for i in order]
    prompts = [captions[image][1] for image in chosen]
    notes = {"captions.json": json.dumps({f"{image:012d}": captions[image][1] for image in chosen}, indent=0)}
    return _repeated("coco", prompts, [f"{image:012d}" for image in chosen], samples, notes)


def _repeated(
    kind: str, prompts: Sequence[str], names: Sequence[str], samples: int, notes: dict[str, str]
) -> PromptSet:
    """Every prompt `samples` times; the files of one have its name, those of several a number behind it."""
    files = [f"{name}.png" if samples == 1 else f"{name}-{k}.png" for name in names for k in range(samples)]
    return PromptSet(kind, tuple(prompt for prompt in prompts for _ in range(samples)), tuple(files), notes)
