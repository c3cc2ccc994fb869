"""What may differ from the float32 torch modules at every precision."""

from __future__ import annotations

from dataclasses import dataclass

from far_export.stages import Stage


@dataclass(frozen=True)
class Limits:
    """Limits at one precision. stage: relative error of a call of a stage in lockstep. cosine: 1 - cosine of a call.
    loop: relative error of the free run's latents after any step. psnr: of every picture, in dB. tokens: share of a
    scale's tokens that have to be those of the reference, where a system draws tokens."""

    stage: float
    cosine: float
    loop: float
    psnr: float
    tokens: float


LIMITS = {
    "fp32": Limits(stage=1e-4, cosine=1e-6, loop=1e-3, psnr=40.0, tokens=1.0),
    "fp16": Limits(stage=1e-2, cosine=1e-4, loop=5e-2, psnr=35.0, tokens=0.95),
    "bf16": Limits(stage=5e-2, cosine=2e-3, loop=0.3, psnr=28.0, tokens=0.8),
    "int8": Limits(stage=0.3, cosine=5e-2, loop=1.0, psnr=10.0, tokens=0.5),
}


def stage_tolerance(stage: Stage, precision: str) -> float:
    """Relative error that a stage may have at `precision`; its own where that is larger."""
    return max(stage.tolerance, LIMITS[precision].stage)
