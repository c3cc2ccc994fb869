"""The ledger's reference is the released loop: it draws what the pipeline draws from the same noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from far_export.compare import compare
from far_export.load import load_pair
from far_export.stages import var as var_graphs
from far_export.torch_engine import TorchEngine
from far_models.var import VAR, VARConfig
from far_models.vq_vae import VQVAE, VQVAEConfig
from far_runtime.bundle import open_bundle
from far_runtime.pipeline import Pipeline
from far_runtime.sampling import var as var_loop
from far_runtime.sampling.base import label_condition
from far_runtime.sampling.noise import SeedNoise
from far_runtime.sampling.settings import plan_of, resolve_settings
from released import ReleasedFAR, ReleasedVAR


@pytest.mark.parametrize("system", ["far", "mar"])
def test_the_released_loop_draws_what_the_pipeline_draws(tiny: Any, system: str) -> None:
    checkpoint, folder = (tiny.safetensors, tiny.bundle) if system == "far" else (tiny.mar, tiny.mar_bundle)
    model, _ = load_pair(checkpoint, tiny.vae)
    bundle = open_bundle(folder)
    labels, seeds = [3, 7], [0, 5]
    settings = resolve_settings(bundle.manifest, {"steps": 7})
    with Pipeline.over(bundle, "onnxruntime") as pipeline:
        ours = pipeline.generate(labels, seeds, steps=7).latents
    with torch.inference_mode():
        released = ReleasedFAR(model.model.eval(), steps=7)
        theirs = released.sample(plan_of(bundle.manifest, settings), labels, SeedNoise(seeds)).numpy()
    assert compare(ours, theirs).error < 1e-4
    assert float(np.abs(theirs).max()) > 0.1


def test_the_released_var_draws_the_same_tokens() -> None:
    scales = (1, 2, 4)
    torch.manual_seed(0)
    var = VAR(VARConfig(patch_nums=scales, channels=6, vocabulary=20, classes=5, width=16, depth=2, heads=2)).eval()
    vqvae = VQVAE(
        VQVAEConfig(ch=8, multipliers=(1, 1, 2), blocks=1, channels=6, vocabulary=20, patch_nums=scales)
    ).eval()
    with torch.inference_mode():
        for parameter in var.parameters():
            parameter.normal_(std=0.4)
        stages, model = var_graphs.stages(var, vqvae), var_graphs.var_info(var, vqvae)
        plan = var_loop.plan(model, var_loop.resolve_settings(model, {"guidance": 1.5, "top_k": 9, "top_p": 0.9}))
        engine = TorchEngine(stages)
        condition = label_condition(engine, [1, 2], 5)
        ours = engine.get(var_loop.sample(engine, model, plan, condition, SeedNoise([0, 1])))
        theirs = ReleasedVAR(var, vqvae).sample([1, 2], SeedNoise([0, 1]), 1.5, 9, 0.9).numpy()
    assert compare(ours, theirs).error < 1e-4
