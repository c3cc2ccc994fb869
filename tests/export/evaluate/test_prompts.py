"""Prompt files, and the pictures that the benchmarks' scorers find."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from far_runtime.conditioning.prompt_files import read_prompts
from far_runtime.errors import FarError

if TYPE_CHECKING:
    from conftest import Tiny

Run = Callable[..., Result]


def test_geneval(tmp_path: Path) -> None:
    file = tmp_path / "evaluation_metadata.jsonl"
    lines = [json.dumps({"tag": "single_object", "include": [], "prompt": f"a photo of {what}"}) for what in "ab"]
    file.write_text("\n".join(lines) + "\n")
    found = read_prompts(file, None, None)
    assert found.prompts == ("a photo of a",) * 4 + ("a photo of b",) * 4
    assert found.names[:5] == (*(f"00000/samples/000{k}.png" for k in range(4)), "00001/samples/0000.png")
    found.write_notes(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "00001" / "metadata.jsonl").read_text()) == json.loads(lines[1])
    assert read_prompts(file, 1, 2).names == ("00000/samples/0000.png", "00000/samples/0001.png")


def test_coco(tmp_path: Path) -> None:
    file = tmp_path / "captions_val2014.json"
    annotations = [{"image_id": i // 2, "id": 100 - i, "caption": f"caption\n{i} "} for i in range(10)]
    file.write_text(json.dumps({"images": [], "annotations": annotations}))
    found = read_prompts(file, 3, None)
    assert found.names == ("000000000004.png", "000000000003.png", "000000000000.png")  # by their ids' SHA-256
    assert found.prompts == ("caption 9", "caption 7", "caption 1")  # of two captions, that with the smaller id
    file.write_text(json.dumps({"annotations": annotations[::-1]}))
    again = read_prompts(file, None, None)
    assert again.names[:3] == found.names
    assert again.prompts[:3] == found.prompts


def test_lines_of_text(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\n\r\n zwei \u2028 drei \r\n".encode())
    assert read_prompts(file, None, 2).names == ("00000-0.png", "00000-1.png", "00001-0.png", "00001-1.png")
    assert read_prompts(file, None, None).prompts == ("one", "zwei \u2028 drei")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.jsonl", b"{}\n"),
        ("bad.jsonl", b"prompt\n"),
        ("bad.json", b"[]"),
        ("bad.json", b'{"annotations": []}'),
        ("bad.json", b'{"annotations": [{"image_id": 3}]}'),
        ("empty.txt", b"\n"),
        ("picture.txt", b"\x89PNG"),
    ],
)
def test_files_without_prompts(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FarError, match="prompts "):
        read_prompts(tmp_path / name, None, None)


def test_pictures_of_prompts_stand_where_the_scorer_looks(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    file, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    file.write_text('{"prompt": "a red apple"}\n{"prompt": "a smiling face"}\n')
    arguments = (tiny.t2i_bundle, "--prompts", file, "--samples", 3, "--batch-size", 2, "-o", out)
    assert run(*arguments, "--count", 1).exit_code == 0
    assert len(list(out.glob("0000?/samples/000?.png"))) == 3
    assert "going on: 2 are there" in run(*arguments).output
    assert len(list(out.glob("0000?/samples/000?.png"))) == 6
    assert (out / "00000" / "metadata.jsonl").read_text() == '{"prompt": "a red apple"}\n'
    lost = out / "00001" / "samples" / "0002.png"
    first = lost.read_bytes()
    lost.unlink()
    assert "going on: 4 are there" in run(*arguments).output
    assert lost.read_bytes() == first
    result = run(*arguments[:5], "--seed", 1, "-o", out)
    assert "seed 0 -> 1" in str(result.exception)
    assert "prompts" in str(run(*arguments[:3], "--samples", 2, "-o", out).exception)
    file.write_text('{"prompt": "a green apple"}\n{"prompt": "a smiling face"}\n')
    assert "was begun with other settings" in str(run(*arguments).exception)
    assert (out / "00000" / "metadata.jsonl").read_text() == '{"prompt": "a red apple"}\n'


def test_pictures_of_prompts_are_compared_later(run: Run, tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a red apple\na green apple\na lion\n")
    arguments = (tiny.t2i_bundle, "--prompts", file, "-o", out)
    assert run(*arguments).exit_code == 0
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(out / "00002.png")  # shows that it is not drawn again
    result = run(*arguments, "--reference", folder, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["count"] == 3
    assert not np.asarray(Image.open(out / "00002.png")).any()
