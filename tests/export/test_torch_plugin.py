"""torch beside the engines in far bench: the checkpoint's own modules, eager and compiled."""

from __future__ import annotations

import configparser
import importlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import far_runtime.bench.engine_specs
import far_runtime.bench.matmul_rate
import far_runtime.bench.runner
from far_export.torch_plugin import matrix_product, open_plugin
from far_runtime.bench.engine_specs import GROUP, CheckpointFiles
from far_runtime.bundle import open_bundle
from far_runtime.cli.main import main
from far_runtime.engines.base import EngineOptions
from far_runtime.errors import FarError
from far_runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from conftest import Tiny

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = EngineOptions(threads=1)


def added() -> dict[str, str]:
    """The entry points of setup.cfg, which an older install may not have."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = parser["options.entry_points"][GROUP].split("\n")
    return {name.strip(): module.strip() for name, _, module in (line.partition("=") for line in lines) if module}


def latents(bundle: Path, engine: Any) -> Any:
    pipeline = Pipeline(open_bundle(bundle, check=False), engine)
    return pipeline.generate([1, 4], [0, 7], batch_size=2).latents


def test_torch_is_measured_beside_an_engine(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far_runtime.bench.engine_specs, "engine_plugins", added)
    monkeypatch.setattr(far_runtime.bench.matmul_rate, "SIZE", 64)
    monkeypatch.setattr(far_runtime.bench.runner, "REST", 0)
    file = tmp_path / "bench.json"
    command = ["bench", tiny.bundle, "--engine", "onnxruntime", "--engine", "torch", "--checkpoint", tiny.safetensors]
    more = ["--vae", tiny.vae, "--batch", 2, "--repeat", 1, "--threads", 1, "--json", file]
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in (*command, *more)])
    assert ended.value.code == 0 and capsys.readouterr().err == ""
    engine, reference = json.loads(file.read_text())["engines"]
    assert (reference["name"], reference["version"], reference["precision"]) == ("torch", torch.__version__, "fp32")
    stages = [[stage["stage"] for stage in one["batches"][0]["stages"]] for one in (engine, reference)]
    assert stages[0] == stages[1] == ["transformer", "denoise", "decode", "copies", "host"]
    assert "torch" in json.loads(file.read_text())["rates"][0]["methods"]


def test_torch_draws_what_the_bundle_draws(tiny: Tiny) -> None:
    bundle = open_bundle(tiny.masked_bundle)
    engine = open_plugin(bundle, "", ONE_THREAD, CheckpointFiles(tiny.masked, tiny.vae))
    with Pipeline.from_bundle(tiny.masked_bundle, threads=1) as pipeline:
        np.testing.assert_allclose(latents(tiny.masked_bundle, engine), latents(tiny.masked_bundle, pipeline.engine),
                                   rtol=1e-3, atol=1e-4)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_torch_computes_the_same(tiny: Tiny) -> None:
    bundle, sources = open_bundle(tiny.bundle), CheckpointFiles(tiny.safetensors, tiny.vae)
    compiled, eager = (open_plugin(bundle, variant, ONE_THREAD, sources) for variant in ("compile", ""))
    assert (compiled.name, eager.name) == ("torch:compile", "torch")
    shape = (2, bundle.manifest.model.tokens, bundle.manifest.model.channels)
    inputs = {"latents": compiled.put(np.random.default_rng(0).standard_normal(shape, np.float32))}
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found, expected = (engine.get(engine.run("decode", inputs)["pixels"]) for engine in (compiled, eager))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert np.abs(found.astype(int) - expected).max() <= 1 and expected.std() > 1


def test_what_torch_lacks_is_named(tiny: Tiny, tmp_path: Path) -> None:
    bundle = open_bundle(tiny.bundle)
    with pytest.raises(FarError, match="give it with --checkpoint FILE"):
        open_plugin(bundle, "", ONE_THREAD, CheckpointFiles())
    with pytest.raises(FarError, match="engine torch:jit: unknown; use torch or torch:compile"):
        open_plugin(bundle, "jit", ONE_THREAD, CheckpointFiles(tiny.safetensors))
    with pytest.raises(FarError, match=r"not the checkpoint or VAE that the bundle was exported from: masked is True"):
        open_plugin(bundle, "", ONE_THREAD, CheckpointFiles(tiny.masked, tiny.vae))
    alone = Path(shutil.copy(tiny.safetensors, tmp_path))
    with pytest.raises(FarError, match=r"vae\.ckpt: no such file; give the VAE .* --vae vae\.ckpt"):
        open_plugin(bundle, "", ONE_THREAD, CheckpointFiles(alone))


def test_the_entry_point_leads_to_a_plugin() -> None:
    assert set(added()) == {"torch"}
    for module in added().values():
        plugin = importlib.import_module(module)
        assert callable(plugin.open_plugin) and callable(plugin.matrix_product)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_matrices_are_multiplied_in_every_precision_of_the_processor(precision: str) -> None:
    product = matrix_product("cpu", precision, 64, 1)
    assert product is not None and product() is None
    assert matrix_product("cpu", "fp16", 64, 1) is None and matrix_product("npu", precision, 64, 1) is None
