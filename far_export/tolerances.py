"""What may differ from the float32 torch modules, at every precision.

FP32 is judged by the stages' own tolerances, from which the limits of the free run follow
(`far_export.verify.results`). At a lower precision the stages keep the limit of that precision, in lockstep. The free
run is judged where it can be:

- FAR, FAR-T2I and MAR draw from the same noise on both sides, so pictures stay close: LIMITS has what they need;
- VAR draws tokens. One that falls the other way, where two were nearly as good, changes all that follows: a picture as
  good, but another. In lockstep every scale is judged on the reference's own tokens; the free run is only shown;
- INT8 is judged by the distribution of its pictures (`far_export.verify.distribution`): the free run is only shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from far_export.stages.stage import Stage

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Limits:
    """stage: relative error of any call of a stage in lockstep. loop: relative error of the free run's latents after
    any step. psnr: of every picture, in dB."""

    stage: float
    loop: float
    psnr: float


# Worst that was seen on far-emoji-64, which is trained (scripts/studies/check_precision.py, 8 pictures;
# docs/precision.md), and on tiny random models of all systems. FP16, in FP16 arithmetic: stages 9.0e-4, loop 2e-3,
# pictures 48.9 dB. BF16: stages 8.8e-3, loop 7.7e-2, pictures 33.1 dB. INT8: stages 2.6e-2. A loop deviates by picture,
# hence its wider margin; deeper networks add up more roundings than its 8 blocks.
LIMITS = {
    "fp16": Limits(stage=1e-2, loop=0.1, psnr=35.0),
    "bf16": Limits(stage=5e-2, loop=0.3, psnr=28.0),
    "int8": Limits(stage=0.1, loop=math.inf, psnr=-math.inf),
}


def stage_tolerance(stage: Stage, precision: str) -> float:
    """Relative error that a stage may have where its matrix products have that precision; its own where that is
    larger."""
    return stage.tolerance if precision == "fp32" else max(stage.tolerance, LIMITS[precision].stage)


def free_run_limits(precision: str, draws_tokens: bool, tolerance: float, scale: float) -> tuple[float, float]:
    """Relative error of the latents, and PSNR in dB, that a free run needs; infinite where it is not judged.

    tolerance: the largest of the loop's stages; scale: what it has been multiplied by.
    """
    if precision == "fp32":
        return LOOP_FACTOR * tolerance, required_psnr(LOOP_FACTOR * tolerance)
    if draws_tokens:
        return math.inf, -math.inf
    limits = LIMITS[precision]
    return limits.loop * scale, limits.psnr - 20 * math.log10(scale)


LOOP_FACTOR = 10.0


def required_psnr(latents_limit: float) -> float:
    """PSNR in dB that a picture needs where its latents may be off by `latents_limit`.

    40 dB for 1e-3, 20 dB less for ten times the error, never below 25 dB, where differences begin to be seen.
    """
    return min(40.0, max(25.0, -20.0 - 20.0 * math.log10(latents_limit)))
