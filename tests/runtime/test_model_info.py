"""The manifest's entry on the network: read into a type, written as it was, refused with file and key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from far_runtime.bundle import MANIFEST, manifest_checksum, open_bundle, read_manifest, write_manifest
from far_runtime.errors import FarError
from far_runtime.model_info import FarInfo, FarT2iInfo, ModelInfo, TextSettings, VarInfo, model_info

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "format-6"
SIZES = {"grid": 4, "channels": 4, "image_size": 16}
TEXT = {"tokens": 6, "prefix": [7, 8], "system_prompt": "draw", "pad": 0, "padding_side": "left"}
RECORDS: dict[str, dict[str, Any]] = {
    "far": {**SIZES, "classes": 10, "masked": False, "prediction": "v", "filter": "spatial", "vae": {"ch": 8}},
    "far_t2i": {
        **SIZES, "condition": "text", "prediction": "epsilon", "context_tokens": 8, "context_width": 12,
        "text": {**TEXT, "language": "en"},
    },
    "mar": {**SIZES, "classes": 10, "masked": True, "prediction": "epsilon"},
    "var": {
        **SIZES, "classes": 5, "patch_nums": [1, 2, 4], "phis": 4, "vocabulary": 20, "width": 16, "depth": 2,
        "heads": 2,
    },
    "of_the_future": {**SIZES, "condition": "sound"},
}  # fmt: skip


@pytest.mark.parametrize("system", RECORDS)
def test_a_record_is_written_as_it_was_read(system: str) -> None:
    info = model_info(system, RECORDS[system])
    assert json.dumps(info.to_json()) == json.dumps(RECORDS[system])
    assert info.to_json() == model_info(system, info.to_json()).to_json()
    assert (info.grid, info.tokens, info.takes_text) == (4, 16, system == "far_t2i")
    assert replace(info, channels=7).to_json() == RECORDS[system] | {"channels": 7}


def test_each_system_has_its_own_type() -> None:
    far, t2i, var = (model_info(system, RECORDS[system]) for system in ("far", "far_t2i", "var"))
    assert isinstance(far, FarInfo) and not far.masked and far.classes == 10
    assert isinstance(t2i, FarT2iInfo) and t2i.masked
    assert t2i.text == TextSettings(tokens=6, prefix=(7, 8), system_prompt="draw", pad=0, padding_side="left")
    assert isinstance(var, VarInfo) and var.patch_nums == (1, 2, 4)
    assert type(model_info("of_the_future", RECORDS["of_the_future"])) is ModelInfo


def test_a_text_encoder_is_added_to_what_was_read() -> None:
    record = {name: value for name, value in RECORDS["far_t2i"].items() if name != "text"}
    info = model_info("far_t2i", record)
    assert isinstance(info, FarT2iInfo) and info.text is None and info.to_json() == record
    text = TextSettings(tokens=6, prefix=(7, 8), system_prompt="draw", pad=0, padding_side="left")
    assert replace(info, text=text).to_json() == record | {"text": TEXT}


@pytest.mark.parametrize(
    ("system", "change", "message"),
    [
        ("far", {"grid": None}, "model.grid is None; expected a whole number; export the bundle again"),
        ("far", {"grid": True}, "model.grid is True; expected a whole number"),
        ("far", {"masked": 1}, "model.masked is 1; expected true or false"),
        ("mar", {"prediction": 3}, "model.prediction is 3; expected a text"),
        ("var", {"patch_nums": [1, "2"]}, r"model.patch_nums is \[1, '2'\]; expected a list of whole numbers"),
        ("far_t2i", {"text": []}, r"model.text is \[\]; expected an object"),
        ("far_t2i", {"text": {**TEXT, "pad": "0"}}, "model.text.pad is '0'; expected a whole number"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(system: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FarError, match=f"^some/{MANIFEST}: {message}"):
        model_info(system, RECORDS[system] | change, f"some/{MANIFEST}")


@pytest.mark.parametrize("system", RECORDS)
def test_a_missing_value_is_refused_with_its_key(system: str) -> None:
    for name in ("grid", "image_size", *{"masked", "patch_nums", "context_width"} & RECORDS[system].keys()):
        record = {key: value for key, value in RECORDS[system].items() if key != name}
        if (system, name) != ("mar", "masked"):  # which says nothing there
            with pytest.raises(FarError, match=f"^{MANIFEST}: model has no '{name}'; export the bundle again"):
                model_info(system, record)


def test_a_bundle_says_in_which_file_it_is_wrong_and_keeps_what_it_does_not_know(tmp_path: Path) -> None:
    content = json.loads((BUNDLE / MANIFEST).read_text())
    content["model"] |= {"later": [1, {"a": 2}]}
    (tmp_path / MANIFEST).write_text(json.dumps({**content, "sha256": manifest_checksum(content)}))
    write_manifest(tmp_path, read_manifest(tmp_path))
    assert json.loads((tmp_path / MANIFEST).read_text())["model"] == content["model"]
    del content["model"]["prediction"]
    (tmp_path / MANIFEST).write_text(json.dumps({**content, "sha256": manifest_checksum(content)}))
    with pytest.raises(FarError, match=rf"{tmp_path / MANIFEST}: model has no 'prediction'"):
        open_bundle(tmp_path)


def test_the_manifest_knows_its_stages() -> None:
    manifest = read_manifest(BUNDLE)
    assert manifest.has_stage("denoise") and not manifest.has_stage("text")
