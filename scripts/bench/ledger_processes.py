"""The two sides of the ledger, each in a process of its own: the released loop in torch, and a bundle on an engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from far_runtime.bench.worker_process import Target, Worker
from far_runtime.bundle import Manifest, open_bundle
from far_runtime.sampling.settings import resolve_plan, resolve_settings

STEPS = 100
"""Diffusion steps of the released loop."""

ITERATIONS_PER_TIMING = 8
"""MAR's transformer is timed once for so many iterations."""


@contextlib.contextmanager
def running(target: Target) -> Iterator[Worker]:
    """A process that holds `target` until the end of the block."""
    worker = Worker(target)
    try:
        yield worker
    finally:
        worker.close()


@dataclass
class ReleasedLoop:
    """The released loop over one checkpoint, whose parts are timed one by one."""

    folder: Path
    """Folder of checkpoint-last.pth, vae.pth and at least one bundle."""

    amp: bool
    """Whether networks run under bf16 autocast."""

    compiled: bool = False
    """Whether networks run through torch.compile."""

    _parts: dict[str, Callable[[], Any]] = field(default_factory=dict, init=False)

    def open(self) -> dict[str, int]:
        """Load the checkpoint; how often each part is called for one picture."""
        import torch

        from far_export.load import load_pair
        from far_export.stages.vae import DecodeStageModule

        model, decoder = load_pair(self.folder / "checkpoint-last.pth", self.folder / "vae.pth")
        network, vae = model.model.eval(), decoder.model.eval()
        manifest = open_bundle(next(path.parent for path in self.folder.glob("*/manifest.json")), check=False).manifest
        if model.system == "var":
            return self._prepare_var(network, vae, resolve_settings(manifest))
        decode = DecodeStageModule(vae, network.config.grid, network.config.latent_scale).eval()
        counts = self._prepare_diffusion(network, manifest)
        latents = torch.randn(1, network.config.tokens, network.config.channels)
        self._parts["decode"] = lambda: self._with_autocast(lambda: decode(latents))
        return {**counts, "decode": 1}

    def part(self, name: str) -> float:
        """Seconds of one call of a part."""
        import torch

        started = time.perf_counter()
        with torch.no_grad():
            self._parts[name]()
        return time.perf_counter() - started

    def level(self) -> float:
        """Seconds of one whole level: the transformer once and every diffusion step."""
        return self.part("transformer") + sum(self.part("head") for _ in range(STEPS))

    def _with_autocast(self, compute: Any) -> Any:
        from bench.released import autocast

        with autocast(self.amp):
            return compute()

    def _prepare_var(self, var: Any, vqvae: Any, settings: Mapping[str, Any]) -> dict[str, int]:
        """VAR's loop is fast enough to be timed whole."""
        from bench.released import ReleasedVAR
        from far_export.stages.vae import DecodeStageModule
        from far_runtime.sampling.noise import SeedNoise

        released = ReleasedVAR(var, vqvae, self.amp, self.compiled)
        decode = DecodeStageModule(vqvae, var.config.patch_nums[-1], 1.0).eval()
        sampling = {name: settings[name] for name in ("guidance", "top_k", "top_p")}

        def whole() -> None:
            latents = released.sample([1], SeedNoise([0]), **sampling)
            self._with_autocast(lambda: decode(latents))

        self._parts["picture"] = whole
        return {"picture": 1}

    def _prepare_diffusion(self, model: Any, manifest: Manifest) -> dict[str, int]:
        """The transformer's and the head's calls of FAR and MAR, by the sizes that their time depends on."""
        import torch

        from bench.released import ReleasedFAR
        from far_runtime.sampling.noise import SeedNoise

        config = model.config
        released = ReleasedFAR(model, STEPS, self.amp, self.compiled)
        both, latents = torch.tensor([1, config.classes]), torch.randn(1, config.tokens, config.channels)
        plan = resolve_plan(manifest, {"preset": "official"})[1]

        def head(tokens: int, level: float | None) -> Any:
            x, noise = torch.randn(2 * tokens, config.channels), torch.randn(2 * tokens, config.channels)
            z = torch.randn(2 * tokens, config.decoder_width)
            return lambda: released.head.step(x, z, STEPS // 2, level, 2.0, 1.0, noise)

        if manifest.system == "far":
            self._parts["transformer"] = lambda: released.transformer(latents, both)
            self._parts["head"] = head(config.tokens, 3.0)
            return {"transformer": len(plan), "head": STEPS * len(plan)}
        noise, counts = SeedNoise([0]), {}
        for start in range(0, len(plan), ITERATIONS_PER_TIMING):
            group = plan[start : start + ITERATIONS_PER_TIMING]
            indices = released.indices(noise, int(group[len(group) // 2].visible))
            name = f"transformer {start + 1}"
            self._parts[name] = lambda indices=indices: released.transformer(latents, both, *indices)
            counts[name] = len(group)
        per_step = [int(step.tokens) for step in plan]
        for tokens in sorted(set(per_step)):
            self._parts[f"head {tokens}"] = head(tokens, None)
            counts[f"head {tokens}"] = STEPS * per_step.count(tokens)
        return counts


@dataclass
class BundlePipeline:
    """A bundle on an engine, through the ordinary Pipeline."""

    bundle: Path
    engine: str
    _pipeline: Any = field(default=None, init=False)
    _count: int = field(default=0, init=False)

    def open(self) -> str:
        """Open the engine; returns its name."""
        from far_runtime.pipeline import Pipeline

        self._pipeline = Pipeline.from_bundle(self.bundle, self.engine, check=False)
        return str(self._pipeline.engine.name)

    def generate(self, settings: Mapping[str, Any], batch: int) -> dict[str, float]:
        """Seconds of a batch, in all ("") and by stage; its classes were not generated before, so nothing is cached."""
        from far_runtime.engines.timed import TimedEngine
        from far_runtime.pipeline import Pipeline

        classes = self._pipeline.bundle.manifest.model.classes
        labels = [(self._count + i) % classes for i in range(batch)]
        self._count += batch
        timed = TimedEngine(self._pipeline.engine)
        started = time.perf_counter()
        generation = Pipeline(self._pipeline.bundle, timed).generate(labels, labels, batch_size=batch, **settings)
        seconds = time.perf_counter() - started
        if not np.isfinite(generation.latents).all() or float(generation.images.std()) == 0:
            raise RuntimeError(f"{self.bundle}: its pictures are flat or not finite, which cannot be timed")
        return {"": seconds, **{stage: sum(calls) for stage, calls in timed.seconds.items()}}
