"""A text encoder in a bundle: its graph computes what the network computes, and a wrong one is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from far_export.export import export_bundle
from far_export.onnx.writer import export_stages
from far_export.stages.text import load_text_part
from far_models.far_t2i import FART2IConfig
from far_models.text.encoder import load_text_encoder
from far_runtime.bundle import open_bundle
from far_runtime.cli.main import main
from far_runtime.conditioning.text import load_tokenizer, tokenize
from far_runtime.errors import FarError

onnxruntime = pytest.importorskip("onnxruntime")
CONFIG = FART2IConfig(context_tokens=8, context_width=12)


def test_qwen2s_graph_drops_the_system_prompt_and_keeps_padding(tiny: Any, tmp_path: Path) -> None:
    part = load_text_part(tiny.qwen2, CONFIG)
    (graph,) = export_stages([part.stage], tmp_path)
    assert [spec.shape for spec in graph.inputs] == [("batch", 140), ("batch", 140)]
    assert [spec.shape for spec in graph.outputs] == [("batch", 8, 12)]
    assert set(graph.flops) == {""}
    ids, mask, _ = tokenize(load_tokenizer(tiny.qwen2), part.settings, ["a red apple", "the lion"])
    session = onnxruntime.InferenceSession(str(tmp_path / graph.file), providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"ids": ids, "mask": mask})
    encoder = load_text_encoder(tiny.qwen2, 8)
    with torch.inference_mode():
        whole = encoder.network(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    assert np.linalg.norm(features - whole[:, 132:]) <= 1e-5 * np.linalg.norm(features)
    assert not np.allclose(features[0, 5], features[1, 5], atol=1e-3)  # padding attends to the prompt before it


def test_a_text_encoder_of_another_width_is_refused_with_both_widths(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(FarError, match="its features are 12 wide, the checkpoint's context_embed takes 1536"):
        load_text_part(tiny.bert, FART2IConfig(context_tokens=8))


def test_a_label_model_takes_no_text_encoder(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(FarError, match="a far model draws from class labels; leave it out"):
        export_bundle(tiny.safetensors, tiny.vae, tmp_path / "bundle", text_encoder=tiny.bert)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_holds_the_tokenizer_and_how_to_use_it(tiny: Any) -> None:
    manifest = open_bundle(tiny.t2i_bundle).manifest
    assert manifest.model.condition == "text"
    assert manifest.model.text == load_text_encoder(tiny.bert, 8).settings
    assert manifest.source["text_encoder"] == {"folder": "bert"}
    assert (tiny.t2i_bundle / "tokenizer.json").read_bytes() == (tiny.bert / "tokenizer.json").read_bytes()
    assert "tokenizer.json" in manifest.files


def far(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and all output of the command."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    code = ended.value.code
    return int(code or 0), out + err


def test_verify_needs_the_same_text_encoder(tiny: Any, capfd: pytest.CaptureFixture[str]) -> None:
    given = ("verify", tiny.t2i_bundle, "--checkpoint", tiny.t2i, "--vae", tiny.vae, "--prompt", "a red lion")
    assert far(capfd, *given) == (
        2, "error: the bundle has a text encoder; give the folder that it came from: --text-encoder bert\n",
    )  # fmt: skip
    code, output = far(capfd, *given, "--text-encoder", tiny.qwen2)
    assert code == 2
    assert "not the text encoder that the bundle was exported with" in output
    code, output = far(capfd, *given, "--negative", "the city", "--text-encoder", tiny.bert)
    assert code == 0, output
    assert "passed" in output
    assert "context" in output
