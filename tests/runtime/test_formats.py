"""Bundles of every manifest format since 5 are read, and draw what they drew when they were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from far_runtime.bundle import FORMAT, MANIFEST, OLDEST_FORMAT, manifest_checksum, open_bundle
from far_runtime.errors import FarError
from far_runtime.pipeline import Pipeline

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
FORMATS = range(OLDEST_FORMAT, FORMAT + 1)


@pytest.mark.parametrize("version", FORMATS)
def test_a_bundle_of_each_format_draws_its_pictures(version: int) -> None:
    folder = BUNDLES / f"format-{version}"
    assert json.loads((folder / MANIFEST).read_text())["format"] == version
    with Pipeline.from_bundle(folder, "onnxruntime", threads=1) as pipeline:
        drawn = pipeline.generate([1, "red fox"], [0, 7])
    with np.load(BUNDLES / f"format-{version}.npz") as expected:
        np.testing.assert_allclose(drawn.latents, expected["latents"], rtol=0, atol=1e-5)
        assert np.abs(drawn.images.astype(int) - expected["images"]).max() <= 1


@pytest.mark.parametrize("version", FORMATS)
def test_settings_and_presets_of_each_format(version: int) -> None:
    manifest = open_bundle(BUNDLES / f"format-{version}").manifest
    assert (manifest.default_settings["steps"], manifest.default_settings["guidance"]) == ("3", 2.0)
    assert manifest.presets["fast"]["settings"] == {"steps": 2, "solver": "dpmpp-2m"}
    assert manifest.classes == ("crane", "owl", "red fox")


@pytest.mark.parametrize(("version", "advice"), [(OLDEST_FORMAT - 1, "export it again"), (FORMAT + 1, "update it")])
def test_other_formats_are_refused_by_number(tmp_path: Path, version: int, advice: str) -> None:
    folder = Path(shutil.copytree(BUNDLES / f"format-{FORMAT}", tmp_path / "bundle"))
    content = {**json.loads((folder / MANIFEST).read_text()), "format": version}
    (folder / MANIFEST).write_text(json.dumps({**content, "sha256": manifest_checksum(content)}))
    with pytest.raises(FarError, match=f"format {version}.*reads {OLDEST_FORMAT} to {FORMAT}; {advice}"):
        open_bundle(folder)
