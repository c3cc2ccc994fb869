"""torch as an engine of `far bench`: the checkpoint's modules, eager or compiled; and torch's matrix product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from far_export.torch_engine import TorchEngine
from far_runtime.bench.engine_specs import CPU, GPU, CheckpointFiles
from far_runtime.bundle import Bundle
from far_runtime.engines.base import EngineOptions
from far_runtime.errors import FarError

VARIANTS = ("", "compile")


def open_plugin(bundle: Bundle, variant: str, options: EngineOptions, sources: CheckpointFiles) -> TorchEngine:
    """The stages of a bundle's checkpoint as torch modules in float32 on the CPU.

    The variant is "" for eager modules, or "compile" for torch.compile with its defaults, which compiles every module
    for the first batch size and then once more for any batch size. More compilations than torch allows are an error, so
    that no module returns to eager unnoticed. Raises FarError for another variant, and without the checkpoint that the
    bundle was exported from.
    """
    from far_export.load import load_pair
    from far_export.verify.reference import check_sizes, recorded_vae, reference_stages, reference_text

    if variant not in VARIANTS:
        raise FarError(f"engine torch:{variant}: unknown; use torch or torch:compile")
    if sources.checkpoint is None:
        raise FarError("engine torch: runs the checkpoint that the bundle came from; give it with --checkpoint FILE")
    if options.threads:
        torch.set_num_threads(options.threads)
    manifest = bundle.manifest
    vae = sources.vae or recorded_vae(manifest, sources.checkpoint)
    weights = manifest.source.get("checkpoint", {}).get("weights") or None
    model, decoder = load_pair(sources.checkpoint, vae, weights, manifest.source.get("config", {}), manifest.system)
    check_sizes(manifest, model.model, decoder.model)
    text = reference_text(manifest, model, sources.text_encoder)
    stages = reference_stages(manifest, model.model, decoder.model, text)
    if variant == "compile":
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        stages = [replace(stage, module=torch.compile(stage.module)) for stage in stages]
    engine = TorchEngine(stages)
    engine.name = f"torch:{variant}" if variant else "torch"
    return engine


def matrix_product(device: str, precision: str, size: int, threads: int | None) -> Callable[[], object] | None:
    """A function that multiplies two [size, size] matrices by torch on "cpu" or "gpu"; None where torch cannot."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    types |= {"fp16": torch.float16} if device == GPU else {}
    if device not in (CPU, GPU) or precision not in types or (device == GPU and not torch.cuda.is_available()):
        return None
    if threads:
        torch.set_num_threads(threads)
    place = "cuda" if device == GPU else "cpu"
    a, b = ((10 * torch.randn(size, size)).to(types[precision]).to(place) for _ in range(2))
    multiply = torch._int_mm if precision == "int8" else torch.mm

    def product() -> None:
        multiply(a, b)
        if device == GPU:
            torch.cuda.synchronize()

    return product
