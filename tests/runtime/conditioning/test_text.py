"""Prompts become tokens, features and context without torch; what is cut, empty or negative is treated as promised."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from far_runtime.bundle import Manifest, open_bundle
from far_runtime.conditioning.subjects import Subject
from far_runtime.conditioning.text import load_tokenizer, text_condition, tokenize
from far_runtime.engines.base import Engine
from far_runtime.errors import FarError
from far_runtime.model_info import TextSettings
from far_runtime.pipeline import Pipeline

SETTINGS = TextSettings(
    tokens=6, prefix=(7, 8), pad=0, padding_side="right"
)  # the tiny BERT's tokenizer: [CLS] 1, [SEP] 2


@pytest.fixture(scope="module")
def pipeline(tiny: Any) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(tiny.t2i_bundle, threads=1) as opened:
        yield opened


def test_rows_are_the_prefix_the_prompt_and_padding(tiny: Any) -> None:
    ids, mask, warnings = tokenize(load_tokenizer(tiny.bert), SETTINGS, ["a red apple", "A  LION"])
    assert ids.dtype == mask.dtype == np.int64
    assert ids.tolist() == [[7, 8, 1, 4, 5, 7, 2, 0], [7, 8, 1, 4, 8, 2, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert warnings == ()


def test_padding_on_the_left_where_the_tokenizer_pads_there(tiny: Any) -> None:
    ids, mask, _ = tokenize(load_tokenizer(tiny.bert), replace(SETTINGS, padding_side="left"), ["a lion"])
    assert ids.tolist() == [[7, 8, 0, 0, 1, 4, 8, 2]]
    assert mask.tolist() == [[1, 1, 0, 0, 1, 1, 1, 1]]


def test_a_long_prompt_is_cut_with_a_warning_and_keeps_its_end(tiny: Any) -> None:
    prompts = ["the cat and the lion of the city street and the red apple", "a cat"]
    ids, mask, warnings = tokenize(load_tokenizer(tiny.bert), SETTINGS, prompts)
    assert ids[0].tolist() == [7, 8, 1, 13, 14, 11, 13, 2]
    assert ids[1].tolist() == [7, 8, 1, 4, 14, 2, 0, 0]  # what was cut before does not matter
    assert mask[0].all()
    assert warnings == (
        "prompt 'the cat and the lion of the city street ...': 15 tokens, the model reads 6; the rest is cut",
    )


def test_without_the_library_the_extra_is_named(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(FarError, match=r"pip install 'far-deploy\[text\]'"):
        load_tokenizer(tiny.bert)


def test_a_missing_or_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FarError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FarError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


class Counting:
    """An engine that notes how many rows each stage ran on."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name = engine, engine.name
        self.put, self.get, self.close = engine.put, engine.get, engine.close
        self.rows: list[tuple[str, int]] = []

    def run(self, stage: str, inputs: Any, constants: Any = None) -> dict[str, Any]:
        outputs = self.engine.run(stage, inputs, constants)
        self.rows.append((stage, len(self.get(next(iter(outputs.values()))))))
        return outputs


def contexts(
    pipeline: Pipeline, prompts: Sequence[str], negatives: Sequence[str], manifest: Manifest | None = None
) -> tuple[Any, Any, list[tuple[str, int]]]:
    engine = Counting(pipeline.engine)
    bundle = pipeline.bundle
    condition, _ = text_condition(
        engine,
        replace(bundle, manifest=manifest or bundle.manifest),
        [Subject(None, *texts) for texts in zip(prompts, negatives, strict=True)],
    )
    assert condition.batch == len(prompts)
    return engine.get(condition.cond["context"]), engine.get(condition.cond_uncond["context"]), engine.rows


def test_every_text_is_encoded_once_and_no_text_is_the_null_condition(pipeline: Pipeline) -> None:
    cond, cond_uncond, rows = contexts(pipeline, ["a lion", "a cat", "a lion", " "], ["", "a cat", "", ""])
    assert rows == [("text", 2), ("context", 4), ("context", 8)]
    assert np.array_equal(cond, cond_uncond[:4])
    assert np.array_equal(cond[0], cond[2])
    assert not np.allclose(cond[0], cond[1], atol=1e-3)
    null = cond[3]
    for row in (4, 6, 7):
        assert np.array_equal(cond_uncond[row], null)
    assert np.array_equal(cond_uncond[5], cond[1])  # a negative prompt stands where the null condition would


def test_without_any_text_no_encoder_runs(pipeline: Pipeline) -> None:
    cond, cond_uncond, rows = contexts(pipeline, ["", ""], ["", ""])
    assert rows == [("context", 2), ("context", 4)]
    assert np.array_equal(cond_uncond[2:], cond)


def test_a_bundle_without_a_text_encoder_takes_no_prompts(pipeline: Pipeline) -> None:
    manifest = pipeline.bundle.manifest
    bare = replace(manifest, graphs=tuple(graph for graph in manifest.graphs if graph.stage != "text"))
    with pytest.raises(FarError, match="export it again with --text-encoder DIR"):
        contexts(pipeline, ["a lion"], [""], bare)
    assert len(contexts(pipeline, [""], [""], bare)[0]) == 1


def test_pictures_follow_prompt_negative_prompt_and_seed(pipeline: Pipeline) -> None:
    prompts = ["a lion", "a red apple", ""]
    generation = pipeline.generate(prompts, [0, 0, 0])
    assert generation.images.shape == (3, 16, 16, 3)
    assert [picture.name for picture in generation.settings] == prompts
    first, second, third = generation.latents
    assert not np.allclose(first, second, rtol=1e-3)
    assert not np.allclose(first, third, rtol=1e-3)
    negative = pipeline.generate(["a lion"], [0], negative="the city")
    assert not np.allclose(negative.latents[0], first, rtol=1e-3)
    assert negative.settings[0].negative == "the city"
    alone = pipeline.generate(["a red apple"], [0]).latents[0]
    assert np.linalg.norm(alone - second) <= 1e-4 * np.linalg.norm(second)  # the batch does not matter
    again = pipeline.like(generation.settings[1])
    assert np.array_equal(again.images[0], generation.images[1])


def test_a_cut_prompt_warns(pipeline: Pipeline) -> None:
    generation = pipeline.generate(["the red and green cat of the city street"], [0])
    assert [warning.split(";")[0] for warning in generation.warnings] == [
        "prompt 'the red and green cat of the city street': 11 tokens, the model reads 8"
    ]


def test_labels_are_refused(pipeline: Pipeline) -> None:
    from far_runtime.conditioning.subjects import resolve_subjects

    with pytest.raises(FarError, match="use prompt TEXT in place of label"):
        resolve_subjects(pipeline.bundle.manifest, labels=[3])


def test_the_tokenizer_has_a_checksum(tiny: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.t2i_bundle, tmp_path / "bundle"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"lion": 5, "red": 8}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(FarError, match=r"tokenizer\.json"):
        open_bundle(folder)
